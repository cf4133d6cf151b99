"""Joining a run from outside: what it is, and whether this machine has all that its workers need.

By address, the configuration comes from the broker. Three things do not travel: the initial model, the file of the
reward function, and the keys.
"""

import os
import socket
from dataclasses import replace
from pathlib import Path

import msgspec

from databus.address import check_address
from databus.client import BusClient
from databus.messages import Hello, Welcome
from echelon.config import RunConfig
from echelon.recipe import RECIPE_FILE
from echelon.roles.worker import Membership
from echelon.run_folder import BusRecord, RunFolder
from rewards.resolve import BUILT_INS, references, with_references
from rollout.environments.resolve import is_file

CONNECT_S = 10.0


def find_run(target: str, keys: Path | None) -> Membership:
    """The run at `target`, a folder or an address. Raises: ValueError, one line, where there is none; BusError."""
    return _by_address(target, keys) if "://" in target else _by_folder(RunFolder(target), keys)


def with_recipe(run: Membership, recipe: Path) -> Membership:
    """The recipe's own reward and environment are taken from `recipe`; any other stays what it is."""

    def moved(reference: str) -> str:
        path, _, function = reference.rpartition(":")
        return f"{recipe}:{function}" if path == RECIPE_FILE else reference

    run = _with_environment(run, recipe)
    return _changed(run, reward=with_references(run.config.reward, moved))


def _with_environment(run: Membership, recipe: Path) -> Membership:
    rollout = run.config.rollout
    path, _, name = rollout.environment.name.rpartition(":")
    if path != RECIPE_FILE:
        return run
    environment = msgspec.structs.replace(rollout.environment, name=f"{recipe}:{name}")
    return _changed(run, rollout=msgspec.structs.replace(rollout, environment=environment))


def with_model(run: Membership, model: str) -> Membership:
    """The same initial model, where this machine has it."""
    return _changed(run, model=model)


def check_has_all(run: Membership) -> None:
    """Raises: ValueError, one line saying what to copy here, or how to say where it is."""
    check_has_all_of(run.config, run.reward_dir)


def check_has_all_of(config: RunConfig, reward_dir: Path) -> None:
    """Args: reward_dir: as of `Membership`. Raises: as above."""
    model = Path(config.model)
    if model.is_absolute() and not model.is_dir():
        raise ValueError(
            f"the run's model {model} is not on this machine: copy it here, and name it with --model where it lies "
            "elsewhere"
        )
    _check_has_environment(config, reward_dir)
    for reference in references(config.reward):
        file = reward_dir / reference.rpartition(":")[0]
        if reference not in BUILT_INS and not file.is_file():
            how = "name the recipe with --recipe" if file.name == RECIPE_FILE else "copy it to the same path"
            raise ValueError(f"the run's reward, {reference}, is not on this machine: {how}")


def _check_has_environment(config: RunConfig, reward_dir: Path) -> None:
    reference = config.rollout.environment.name
    file = reward_dir / reference.rpartition(":")[0]
    if is_file(reference) and not file.is_file():
        how = "name the recipe with --recipe" if file.name == RECIPE_FILE else "copy it to the same path"
        raise ValueError(f"the run's environment, {reference}, is not on this machine: {how}")


def _by_folder(folder: RunFolder, keys: Path | None) -> Membership:
    config, bus = folder.config(), folder.bus()
    if bus is None or not folder.is_in_use():
        raise ValueError(f"no run is under way in {folder.path}")
    if keys is not None:
        bus = msgspec.structs.replace(bus, keys=str(keys))
    return Membership(config=config, bus=bus, reward_dir=folder.path, turns=folder.turns_of(config))


def _by_address(address: str, keys: Path | None) -> Membership:
    if keys is None and address.startswith("tcp://"):
        _check_plain(address)
    bus = BusRecord(address=address, run_id="", keys="" if keys is None else str(keys))
    welcome = _ask(bus)
    try:
        config = msgspec.json.decode(welcome.config_json, type=RunConfig)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the run at {address} is of another version of Echelon than this one: {error}") from None
    if config.placement == "colocated":
        raise ValueError(
            f"the run at {address} is colocated: its workers share the learner's machine; join it there, by its folder"
        )
    bus = msgspec.structs.replace(bus, run_id=welcome.run_id)
    return Membership(config=config, bus=bus, reward_dir=Path(welcome.run_dir))


def _check_plain(address: str) -> None:
    try:
        check_address(address)
    except ValueError:
        raise ValueError(f"--join {address} needs --keys DIR: a bus that other machines reach is encrypted") from None


def _ask(bus: BusRecord) -> Welcome:
    """What the broker tells everyone whom it lets in; an observer may ask."""
    name = f"joining-{socket.gethostname()}-{os.getpid()}"
    hello = Hello(role="observer", name=name, pid=os.getpid(), host=socket.gethostname())
    client = BusClient(bus.address, hello, keys=bus.client_keys("observer"))
    welcome = client.connect(CONNECT_S)
    client.close(goodbye="joined")
    return welcome


def _changed(run: Membership, **settings: object) -> Membership:
    config = msgspec.structs.replace(run.config, **settings)
    return replace(run, config=config)
