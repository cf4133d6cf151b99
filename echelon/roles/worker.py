"""`python -m echelon.roles.worker RUN_DIR --name NAME`: a rollout worker; also what `echelon worker` runs."""

import argparse
import asyncio
import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from databus.address import check_address
from databus.client import BusClient
from databus.errors import BusLost
from databus.messages import Heartbeat, Hello
from echelon.config import RunConfig
from echelon.errors import SIGTERM_CODE, role_main, set_up_logging
from echelon.recipe import RECIPE_FILE
from echelon.run_folder import RunFolder

CONNECT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A run that a worker can join. reward_dir: what the reward's path is relative to."""

    config: RunConfig
    address: str
    run_id: str
    reward_dir: Path


def work(run: Membership, name: str) -> None:
    """Until the broker says stop, or SIGTERM comes. Raises: whatever ends a worker."""
    from rollout.run import WorkerRun, run_worker

    config = run.config
    settings = WorkerRun(
        model=config.model,
        seed=config.seed,
        group_size=config.group_size,
        reward_dir=run.reward_dir,
        draft=config.draft,
    )

    def make_client(version: int, heartbeat: Callable[[], Heartbeat]) -> BusClient:
        hello = Hello(
            role="worker",
            name=name,
            run_id=run.run_id,
            version=version,
            max_sequences=config.rollout.max_sequences,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        return BusClient(run.address, hello, max_message_bytes=config.bus.max_message_bytes, heartbeat=heartbeat)

    try:
        asyncio.run(run_worker(config.rollout, config.reward, settings, make_client))
    except asyncio.CancelledError:  # told to stop before it had started
        sys.exit(SIGTERM_CODE)


def join(target: str, name: str, recipe: Path | None) -> int:
    """Work for the run at `target`, a folder or an address, in the foreground, with the log on stderr.

    Args: recipe: where the recipe lies on this machine, if the run's own copy cannot be reached.
    Raises: ValueError, one line, where there is no run to join.
    """
    run = membership_by_address(target) if "://" in target else membership_by_folder(RunFolder(target))
    if recipe is not None:
        run = _with_recipe(run, recipe)
    set_up_logging(name)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    work(run, name)
    return 0


def membership_by_folder(folder: RunFolder) -> Membership:
    """Raises: ValueError, one line, where no run is under way in it."""
    config = folder.config()
    bus = folder.bus()
    if bus is None or not folder.is_in_use():
        raise ValueError(f"no run is under way in {folder.path}")
    return Membership(config=config, address=bus.address, run_id=bus.run_id, reward_dir=folder.path)


def membership_by_address(address: str) -> Membership:
    """Ask the broker there what it runs. Raises: ValueError for an address that cannot be; BusError."""
    name = f"joining-{socket.gethostname()}-{os.getpid()}"
    hello = Hello(role="observer", name=name, pid=os.getpid(), host=socket.gethostname())
    client = BusClient(check_address(address), hello)
    welcome = client.connect(CONNECT_S)
    client.close(goodbye="joined")
    config = msgspec.json.decode(welcome.config_json, type=RunConfig)
    return Membership(config=config, address=address, run_id=welcome.run_id, reward_dir=Path(welcome.run_dir))


def _with_recipe(run: Membership, recipe: Path) -> Membership:
    """The recipe's own reward is taken from `recipe`; any other stays what it is."""
    path, _, function = run.config.reward.function.rpartition(":")
    if path != RECIPE_FILE:
        return run
    reward = msgspec.structs.replace(run.config.reward, function=f"{recipe}:{function}")
    config = msgspec.structs.replace(run.config, reward=reward)
    return Membership(config=config, address=run.address, run_id=run.run_id, reward_dir=run.reward_dir)


def consequences() -> tuple[type[BaseException], ...]:
    from rollout.run import RunFailedError

    return (RunFailedError, BusLost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    folder = RunFolder(args.run_dir)

    def body() -> None:
        work(membership_by_folder(folder), args.name)

    return role_main(args.name, folder.error_file(args.name), body, consequences)


if __name__ == "__main__":
    sys.exit(main())
