"""Checks across settings, and of this machine: all that can be known before anything heavy is imported."""

import math
import re
from importlib.util import find_spec
from pathlib import Path

from databus.address import check_address
from databus.keys import PEERS, client_keys, server_keys
from echelon.config import RunConfig
from echelon.generated_rows import check_generated, is_generated
from learner.checks import check_learner
from rewards.resolve import check_reward
from rollout.config import NoCurriculum, PassRateBand
from rollout.engine.reasoning import check_budgets
from rollout.scheduling.mixer import check_shares

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
CAUSAL_LM_FILE = "config.json"


def validate(config: RunConfig) -> None:
    """Raises: ValueError, in one line naming the settings to change, for the first thing that cannot work."""
    checks = (
        _check_lengths,
        _check_reasoning,
        _check_groups,
        _check_reward,
        _check_evaluation,
        _check_learner,
        _check_placement,
        _check_keep_best,
        _check_bus,
        _check_weights,
        _check_scheduling,
    )
    for check in checks:
        check(config)


def check_machine(config: RunConfig) -> None:
    """Is what the configuration names here? Raises: ValueError, in one line."""
    _check_model(config.model)
    for key, source in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        _check_data_source(key, source)
    if config.bus.encrypted and config.bus.keys != "auto":
        _check_keys(Path(config.bus.keys))
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise ValueError("rollout.engine is vllm, which is not installed: run `make setup` (GPU=1 for its CUDA build)")


def _check_lengths(config: RunConfig) -> None:
    context = config.rollout.context_tokens
    for key, tokens in (("rollout.max_tokens", config.rollout.max_tokens), ("eval.max_tokens", config.eval.max_tokens)):
        if tokens >= context:
            raise ValueError(
                f"{key} is {tokens}, but prompt and answer share rollout.context_tokens, {context}: "
                "lower the one or raise the other"
            )


def _check_reasoning(config: RunConfig) -> None:
    """The end of thinking takes one token or more; `prepare`, which has the tokenizer, counts them."""
    check_reasoning(config, tag_tokens=1)


def check_reasoning(config: RunConfig, tag_tokens: int) -> None:
    """Raises: ValueError, in one line, where answers have no room for the budgets of thinking and solution."""
    for key, tokens in (("rollout.max_tokens", config.rollout.max_tokens), ("eval.max_tokens", config.eval.max_tokens)):
        if tokens > 0:
            check_budgets(config.rollout.reasoning, tag_tokens, key, tokens)


def _check_groups(config: RunConfig) -> None:
    if config.group_size > config.rollout.max_sequences:
        raise ValueError(
            f"group_size is {config.group_size}, but an engine runs only rollout.max_sequences="
            f"{config.rollout.max_sequences} at once: a group is generated as a whole, so allow at least as many"
        )


def _check_reward(config: RunConfig) -> None:
    check_reward(config.reward)


def _check_evaluation(config: RunConfig) -> None:
    if config.eval.every > 0 and not config.data.eval:
        raise ValueError(
            f"eval.every is {config.eval.every}, but data.eval names no problems: set it, or eval.every to 0"
        )


def _check_learner(config: RunConfig) -> None:
    check_learner(config.learner, config.batch_groups)


def _check_placement(config: RunConfig) -> None:
    devices = config.learner.device, config.rollout.device
    if config.placement == "colocated" and devices[0] != devices[1]:
        raise ValueError(
            f"placement is colocated, one device for both, but learner.device is {devices[0]} and rollout.device "
            f"{devices[1]}: set them to the same, or placement to separate"
        )


def _check_keep_best(config: RunConfig) -> None:
    """Where no checkpoint is of a version that is evaluated, none is the best."""
    saved, evaluated = config.learner.checkpoint_every, config.eval.every
    both = math.lcm(saved, evaluated)  # 0 where one of them is
    if config.learner.keep_best > 0 and not 0 < both < config.learner.steps:
        raise ValueError(
            f"learner.keep_best is {config.learner.keep_best}, but with learner.checkpoint_every={saved} and "
            f"eval.every={evaluated} no checkpoint before the last is evaluated: set the one to a multiple of the other"
        )


def _check_bus(config: RunConfig) -> None:
    bus = config.bus
    if bus.address != "auto":
        check_address(bus.address, bus.encrypted)
    if bus.peer_timeout_s < 2 * bus.heartbeat_s:
        raise ValueError(
            f"bus.peer_timeout_s is {bus.peer_timeout_s:g}, too short for a heartbeat every bus.heartbeat_s="
            f"{bus.heartbeat_s:g} s: allow at least twice as long"
        )


def _check_weights(config: RunConfig) -> None:
    backend, folder, address = config.weights.backend, config.weights.folder, config.bus.address
    if backend == "shm" and address.startswith("tcp://"):
        raise ValueError(
            f"weights.backend is shm, for one machine, but bus.address={address} serves others: set it to bus or file"
        )
    if config.weights.between_gpus:
        _check_between_gpus(config)
    if folder and backend != "file":
        raise ValueError(f"weights.folder is {folder}, but only weights.backend=file uses one: it is {backend}")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"weights.folder is {folder}: no such folder; it must be the same one on every machine")


def _check_between_gpus(config: RunConfig) -> None:
    backend, address = config.weights.backend, config.bus.address
    for setting, device in (("learner.device", config.learner.device), ("rollout.device", config.rollout.device)):
        if device != "cuda":
            raise ValueError(
                f"weights.backend is {backend}, from GPU to GPU, but {setting} is {device}: set it to cuda, or "
                "weights.backend to bus or shm"
            )
    if config.placement == "colocated":
        raise ValueError(
            f"weights.backend is {backend}, which keeps versions on GPUs, but with placement=colocated learner and "
            "engine leave the GPU to each other: set weights.backend to shm or bus"
        )
    if backend == "ipc" and address.startswith("tcp://"):
        raise ValueError(
            f"weights.backend is ipc, for one machine, but bus.address={address} serves others: set it to nccl or bus"
        )


def _check_scheduling(config: RunConfig) -> None:
    scheduling = config.scheduling
    check_shares(scheduling.shares)
    curriculum = scheduling.curriculum
    if not isinstance(curriculum, NoCurriculum) and not (scheduling.mixing and config.data.shuffle):
        raise ValueError("scheduling.curriculum chooses problems, so it needs scheduling.mixing and data.shuffle")
    if isinstance(curriculum, PassRateBand) and curriculum.low >= curriculum.high:
        raise ValueError(
            f"scheduling.curriculum.low is {curriculum.low:g} and high {curriculum.high:g}: low must be below high"
        )


def _check_keys(folder: Path) -> None:
    """A run needs all of them: it starts every role."""
    server_keys(folder, "broker")
    for role in PEERS:
        client_keys(folder, role)


def _check_model(model: str) -> None:
    folder = Path(model).expanduser()
    if not folder.exists():
        if not HUB_ID.fullmatch(model):
            raise ValueError(f"model={model}: no such folder")
        return
    if not folder.is_dir():
        raise ValueError(f"model={model} is a file: name the folder that holds {CAUSAL_LM_FILE}")
    if not (folder / CAUSAL_LM_FILE).is_file():
        raise ValueError(f"model={model} is not a model's folder: it has no {CAUSAL_LM_FILE}")


def _check_data_source(key: str, source: str) -> None:
    if not source and key == "data.train":
        raise ValueError("data.train names no problems: set it to a JSONL or Parquet file, or a hub id")
    if not source:
        return
    if is_generated(source):
        check_generated(key, source)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{key}={source} is a folder: name a JSONL or Parquet file in it")
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise ValueError(f"{key}={source}: cannot read {path.suffix or 'such'} files; expected .jsonl or .parquet")
    elif path.suffix in DATA_SUFFIXES or not HUB_ID.fullmatch(source):
        raise ValueError(f"{key}={source}: no such file")
