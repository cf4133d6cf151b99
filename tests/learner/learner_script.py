"""A scripted broker with synthetic batches, and a learner that trains on them; shared by the learner's tests."""

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from databus.codec import Frame
from databus.groups import Group, encode_group, run_lengths
from databus.messages import Batch, BatchGroup, BatchRequest, Position, PositionRequest, StepDone, Stop
from learner.config import LearnerConfig
from learner.run import LearnerRun, run_learner

MAX_STALENESS = 2
VOCABULARY = 17


def make_group(rng: np.random.Generator, step: int, size: int = 4, equal_rewards: bool = False) -> Group:
    """A random group for `step`: 2 to 5 prompt tokens, 1 to 24 completion tokens, lags 0 to `MAX_STALENESS`."""
    lengths = rng.integers(1, 25, size).astype(np.int32)
    num_tokens = int(lengths.sum())
    versions = np.sort(rng.integers(max(0, step - MAX_STALENESS), step + 1, num_tokens)).astype(np.int32)
    version_values, version_lengths = run_lengths(versions)
    rewards = np.zeros(size) if equal_rewards else rng.permutation(np.arange(size) % 2)
    return Group(
        prompt_ids=rng.integers(3, VOCABULARY, rng.integers(2, 6)).astype(np.int32),
        lengths=lengths,
        token_ids=rng.integers(3, VOCABULARY, num_tokens).astype(np.int32),
        logprobs=-rng.uniform(0.1, 4.0, num_tokens).astype(np.float32),
        loss_mask=(rng.random(num_tokens) < 0.95).astype(np.uint8),
        version_values=version_values,
        version_lengths=version_lengths,
        rewards=rewards.astype(np.float32),
        reward_parts=np.zeros((size, 0), np.float32),
        truncated=np.zeros(size, np.uint8),
    )


def make_groups(step: int, count: int = 4) -> list[Group]:
    """The groups of batch `step`, always the same; the last one has equal rewards."""
    rng = np.random.default_rng(1000 + step)
    return [make_group(rng, step, equal_rewards=index == count - 1) for index in range(count)]


def encode_batch(step: int, groups: Sequence[Group]) -> tuple[Batch, list[Frame]]:
    headers: list[BatchGroup] = []
    frames: list[Frame] = []
    for index, group in enumerate(groups):
        columns, own = encode_group(group)
        headers.append(BatchGroup(group_id=f"g{step}-{index}", columns=columns, first_frame=len(frames)))
        frames += own
    return Batch(step=step, max_staleness=MAX_STALENESS, groups=tuple(headers)), frames


class ScriptedBus:
    """A broker that answers at once, ends the run after the last step, and remembers what it was told."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sent: list[Any] = []
        self.closed = False
        self._answers: deque[tuple[Any, Sequence[Frame]]] = deque()

    def send(self, message: Any) -> None:
        self.sent.append(message)
        match message:
            case BatchRequest(step=step):
                self._answers.append(encode_batch(step, make_groups(step)))
            case PositionRequest(step=step):
                position = Position(step=step, next_cursor=4 * step, pending=((step, 1),), counts={"trained": 4 * step})
                self._answers.append((position, ()))
            case StepDone(step=step) if step == self.steps - 1:
                self._answers.append((Stop(reason="finished"), ()))

    def recv(self, timeout: float) -> tuple[Any, Sequence[Frame]] | None:
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        self.closed = True

    def metrics(self) -> list[dict[str, float]]:
        return [message.metrics for message in self.sent if isinstance(message, StepDone)]


def learner_run(model: Path | str, checkpoints: Path, **changes: Any) -> LearnerRun:
    settings: dict[str, Any] = {
        "model": str(model),
        "serving_dtype": "float32",
        "temperature": 1.0,
        "max_staleness": MAX_STALENESS,
        "seed": 0,
        "checkpoints_dir": checkpoints,
        "bus_address": "ipc:///unused",
        "batch_timeout_s": 30.0,
        "end_timeout_s": 30.0,
        "collective_timeout_s": 60.0,
    }
    return LearnerRun(**(settings | changes))


def train(model: Path | str, checkpoints: Path, config: LearnerConfig, **changes: Any) -> ScriptedBus:
    """Run the learner in this process, on the synthetic batches; the bus that it talked to."""
    bus = ScriptedBus(config.steps)
    run_learner(config, learner_run(model, checkpoints, **changes), lambda version: bus)
    return bus


def rank_main(
    rank: int, world_size: int, port: int, log: Path, arguments: Sequence[str], main: Callable[..., None] | None = None
) -> None:
    """One rank, in a process of its own, with the environment that torchrun would give it.

    Args: main: called with `rank` and `arguments`; None for `train_main`.
    """
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in job.items()}
    (main or train_main)(rank, *arguments)


def train_main(rank: int, *arguments: str) -> None:
    """Args: arguments: MODEL CHECKPOINTS METRICS_OUT RESUME_FROM_OR_- [key=value, section.key=value ...], settings of
    LearnerConfig."""
    model, checkpoints, metrics_out, resume_from, *settings = arguments
    values: dict[str, Any] = {}
    for name, value in (pair.split("=", 1) for pair in settings):
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    config = msgspec.convert(values, LearnerConfig, strict=False)
    bus = train(model, Path(checkpoints), config, resume_from=None if resume_from == "-" else Path(resume_from))
    if rank == 0:
        Path(metrics_out).write_text(json.dumps(bus.metrics()))


def die_while_saving(rank: int, *arguments: str) -> None:
    """As `train_main`, but the second checkpoint gets as far as its last file, and then comes SIGKILL."""
    from learner import checkpoint_folder

    put_in_place, calls = checkpoint_folder._replace, []

    def die_the_second_time(temporary: Path, final: Path) -> None:
        calls.append(final)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        put_in_place(temporary, final)

    checkpoint_folder._replace = die_the_second_time
    train_main(rank, *arguments)


def reshard_main(rank: int, model: str, source: str, target: str) -> None:
    """Load a checkpoint and save it again, with the ranks that there are."""
    from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
    from learner.model import ModelOptions, build_model
    from learner.optimizer import build_optimizer
    from learner.run import process_group

    with process_group("cpu", timeout_s=60.0):
        policy = build_model(model, ModelOptions())
        optimizer, _ = build_optimizer(policy.parameters(), LearnerConfig())
        state = load_checkpoint(Path(source), policy.causal_lm, optimizer)
        write_checkpoint(Path(target), state, state_tensors(policy.causal_lm, optimizer), keep=1)
