"""`python stand_ins.py broker|worker|learner RUN_DIR [--name NAME]`: the roles of a run, quick to start and to die.

The broker and the worker are the real roles; what takes long is replaced: the worker's engine answers at once and its
weights weigh nothing. The learner speaks the real protocol and writes real checkpoints, of a state that folds all that
it was trained on into a hash. All three take faults from the folder RUN_DIR/faults: see `Faults`.
"""

import asyncio
import errno
import hashlib
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from databus.codec import Frame
from databus.messages import Batch, BatchRequest, Manifest, Position, PositionRequest, StepDone, VersionPublished
from databus.process import die_with_parent
from echelon.errors import role_main
from echelon.run_folder import RunFolder

PATIENCE_S = 120.0
RESEND_S = 1.0
PEER_ADDRESS = "CHAOS_ADDRESS"
STEP_S = 0.02


class Faults:
    """Files that switch faults on: `disk-full` while it exists; `clock` holds seconds to add to the wall clock.

    `hold` keeps the learner from its last steps, so that the run does not end before its faults do.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "faults"

    @property
    def disk_full(self) -> Path:
        return self.folder / "disk-full"

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    def install(self) -> None:
        """Put this process under them."""
        real_time, real_pwritev = time.time, os.pwritev

        def jumping_time() -> float:
            try:
                return real_time() + float(self.clock.read_text() or 0)
            except OSError:
                return real_time()

        def pwritev(descriptor: int, parts: Sequence[Any], offset: int) -> int:
            if self.disk_full.exists():
                real_pwritev(
                    descriptor, [memoryview(parts[0])[: len(parts[0]) // 2]], offset
                )  # as far as there is room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real_pwritev(descriptor, parts, offset)

        time.time, os.pwritev = jumping_time, pwritev


def reach_broker_at(address: str) -> None:
    """Have this process find the broker somewhere else than it says: behind a proxy."""
    real = RunFolder.bus

    def bus(folder: RunFolder) -> Any:
        record = real(folder)
        return None if record is None else msgspec.structs.replace(record, address=address)

    RunFolder.bus = bus  # type: ignore[method-assign]


# ---------------------------------------------------------------- broker


def run_broker(run_dir: str) -> int:
    from echelon.roles import broker as role

    sys.argv = ["broker", run_dir]
    return role.main()


# ---------------------------------------------------------------- worker


class InstantEngine:
    """Completes any prompt within milliseconds, with tokens that follow from the prompt and the version."""

    version = 0

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def generate(self, request: Any) -> list[Any]:
        from rollout.engine.base import Completion

        random = np.random.default_rng([*request.prompt_ids, self.version])
        await asyncio.sleep(float(random.uniform(0, 0.02)))
        lengths = random.integers(1, request.sampling.max_tokens, request.group_size, endpoint=True)
        return [
            Completion(
                token_ids=random.integers(3, 30, length, dtype=np.int32),
                logprobs=-random.random(length, dtype=np.float32),
                versions=np.full(length, self.version, np.int32),
                truncated=False,
            )
            for length in lengths
        ]

    async def drain(self) -> None: ...

    async def update(self, snapshot: Any) -> Any:
        from rollout.engine.base import UpdateReport

        self.version = snapshot.version
        return UpdateReport(pause_s=0.0)

    def stats(self) -> Any:
        from rollout.engine.base import EngineStats

        return EngineStats()


class LengthScorer:
    """Rewards length, in this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def score(self, samples: list[Any]) -> list[dict[str, float]]:
        return [{"length": float(sample.num_tokens)} for sample in samples]

    def counters(self) -> dict[str, float]:
        return {}


def pull_nothing(address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
    from rollout.engine.base import Snapshot

    manifest = Manifest(version=version, num_bytes=0, chunk_bytes=1, tensors=())
    return Snapshot(version=version, manifest=manifest, fd=os.memfd_create("nothing"))


def run_worker(run_dir: str, name: str) -> int:
    tensors = types.ModuleType("rollout.engine.tensors")  # imports torch, which takes seconds, and nothing here has any
    tensors.__getattr__ = lambda _: None  # type: ignore[method-assign]
    sys.modules[tensors.__name__] = tensors
    import rollout.run
    import rollout.worker
    from echelon.roles import worker as role

    rollout.run.make_engine = lambda *_, **__: InstantEngine()  # type: ignore[assignment]
    rollout.run.RewardPool = LengthScorer  # type: ignore[misc, assignment]
    rollout.run.load_detokenizer = lambda _: lambda ids: ""
    rollout.worker.RESEND_S = RESEND_S
    role.pull_through = lambda bus: pull_nothing
    sys.argv = ["worker", run_dir, "--name", name]
    return role.main()


# ---------------------------------------------------------------- learner

STATE_FILE = "state.txt"
TRAINED_FILE = "trained.txt"
"""Beside the journal: a line for each step of each life of the learner: step, hash of its batch, hash of its state."""


def run_learner(run_dir: str) -> int:
    folder = RunFolder(run_dir)
    return role_main("learner", folder.error_file("learner"), lambda: learn(folder))


def learn(folder: RunFolder) -> None:
    import learner.bus
    from echelon.roles.learner import connect
    from learner.bus import BrokerLink
    from learner.checkpoint_folder import latest_checkpoint, read_trainer_state

    learner.bus.RESEND_S = RESEND_S
    latest = latest_checkpoint(folder.checkpoints)
    step = 0 if latest is None else read_trainer_state(latest).step
    state = "" if latest is None else (latest / STATE_FILE).read_text()
    bus = connect(folder, step)
    try:
        _train(folder, BrokerLink(bus), step, state)
    finally:
        bus.close()


def _train(folder: RunFolder, link: Any, start_step: int, state: str) -> None:
    config, faults = folder.config(), Faults(folder.path)
    link.send(VersionPublished(version=start_step, address="tcp://127.0.0.1:1", num_bytes=0))
    for step in range(start_step, config.learner.steps):
        while faults.hold.exists() and step >= config.learner.steps - 2:
            time.sleep(0.05)
        batch, frames = link.request(BatchRequest(step=step), Batch, _is_of(step), PATIENCE_S)
        assert len(batch.groups) == config.batch_groups
        digest = _digest(batch, frames)
        state = hashlib.sha256(f"{state}{digest}".encode()).hexdigest()
        with (folder.path / TRAINED_FILE).open("a") as file:
            file.write(f"{step} {digest} {state}\n")
        time.sleep(STEP_S)
        link.send(VersionPublished(version=step + 1, address="tcp://127.0.0.1:1", num_bytes=0))
        link.send(StepDone(step=step, metrics={"loss/policy": float(step)}))
        every = config.learner.checkpoint_every
        if step + 1 == config.learner.steps or (every and (step + 1) % every == 0):
            _save(folder, link, step + 1, state)
    link.wait_for_stop(PATIENCE_S)


def _is_of(step: int) -> Callable[[Any], bool]:
    return lambda message: message.step == step


def _digest(batch: Batch, frames: Sequence[Frame]) -> str:
    digest = hashlib.sha256(" ".join(group.group_id for group in batch.groups).encode())
    for frame in frames:
        digest.update(frame)
    return digest.hexdigest()


def _save(folder: RunFolder, link: Any, step: int, state: str) -> None:
    from learner.checkpoint_folder import TrainerState, finish_checkpoint, oldest_checkpoint, start_checkpoint

    request = PositionRequest(step=step, oldest_checkpoint=oldest_checkpoint(folder.checkpoints))
    position, _ = link.request(request, Position, _is_of(step), PATIENCE_S, through_stop=True)
    (start_checkpoint(folder.checkpoints, step) / STATE_FILE).write_text(state)
    config = folder.config()
    record = TrainerState(step=step, model=config.model, world_size=1, position=position)
    finish_checkpoint(folder.checkpoints, record, config.learner.keep_checkpoints)


def main() -> int:
    role, run_dir, *rest = sys.argv[1:]
    die_with_parent()
    Faults(Path(run_dir)).install()
    if PEER_ADDRESS in os.environ and role != "broker":
        reach_broker_at(os.environ[PEER_ADDRESS])
    match role:
        case "broker":
            return run_broker(run_dir)
        case "worker":
            return run_worker(run_dir, rest[1])
        case "learner":
            return run_learner(run_dir)
    raise SystemExit(f"no such role: {role}")


if __name__ == "__main__":
    sys.exit(main())
