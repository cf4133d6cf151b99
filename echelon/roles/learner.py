"""`python -m echelon.roles.learner RUN_DIR`: one rank of the learner."""

import argparse
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from databus.client import BusClient
from databus.codec import Frame
from databus.config import WeightsConfig
from databus.errors import BusLost
from databus.messages import Hello
from databus.process import run_as_program
from echelon.errors import role_main
from echelon.probe import probe_texts
from echelon.run_folder import RunFolder
from echelon.user_function import load_advantage

logger = logging.getLogger(__name__)

CONNECT_S = 60.0


def learn(folder: RunFolder, memory_dir: Path | None, host: str = "") -> None:
    """Args: memory_dir: for copies of the state, with one in it where another learner of this run has been killed, and
        for versions. host: address of this machine, where the broker is on another; "": it is on this one.

    Raises: whatever ends the learner; `role_main` reports it.
    """
    from learner.checkpoint_folder import DamagedCheckpoint
    from learner.memory_copies import restart_point
    from learner.run import LearnerRun, run_learner

    config = folder.config()
    bus = folder.wait_for_bus(config.rollout.start_timeout_s)
    copies_dir = memory_dir if config.learner.memory_copy_every else None
    patience_s = 2 * config.watchdog_s + config.rollout.start_timeout_s
    run = LearnerRun(
        model=config.model,
        serving_dtype=config.rollout.dtype,
        temperature=config.rollout.temperature,
        max_staleness=config.max_staleness,
        seed=config.seed,
        checkpoints_dir=folder.checkpoints,
        bus_address=_beside(bus.address, config.bus.address if bus.keys else bus.address, host),
        weight_keys=bus.server_keys("learner", allowed=["worker"]),
        resume_from=restart_point(folder.checkpoints, copies_dir),
        memory_dir=copies_dir,
        # The supervisor's watchdog comes first, and counts from when all are up; these are for want of one.
        batch_timeout_s=patience_s,
        end_timeout_s=patience_s + config.eval.timeout_s,
        collective_timeout_s=patience_s,
        advantage_function=load_advantage(config, folder.path),
        probe=probe_texts(folder.train_prompts, config.rollout),
        weights=config.weights,
        weights_dir=weights_dir(config.weights, folder, memory_dir),
        turns=folder.turns_of(config),
    )
    try:
        run_learner(config.learner, run, lambda version: connect(folder, version))
    except DamagedCheckpoint as error:
        raise ValueError(error.advised()) from None


def weights_dir(config: WeightsConfig, folder: RunFolder, memory_dir: Path | None) -> Path | None:
    """Where versions go that are published as files; no other run uses it. None where they are not."""
    if config.backend == "shm":
        assert memory_dir is not None
        return memory_dir / "weights"
    if config.backend == "file":
        return Path(config.folder).resolve() / folder.record().run_id if config.folder else folder.path / "weights"
    return None


def _beside(broker: str, listens: str, host: str) -> str:
    """The address whose host the weight server listens on: the broker's, or this machine's own."""
    return f"tcp://{host}:*" if host and broker.startswith("tcp://") else listens


class LearnerBus:
    """The connection as the learner wants it; it says goodbye, so that the broker need not wait for a silence."""

    def __init__(self, client: BusClient) -> None:
        self._client = client

    def send(self, message: Any) -> None:
        self._client.send(message)

    def recv(self, timeout: float) -> tuple[Any, Sequence[Frame]] | None:
        return self._client.recv(timeout)

    def close(self) -> None:
        self._client.close(goodbye="done")


def connect(folder: RunFolder, version: int) -> LearnerBus:
    """Raises: BusError where the broker does not answer."""
    record = folder.bus()
    assert record is not None
    host = socket.gethostname()
    hello = Hello(role="learner", name="learner", run_id=record.run_id, version=version, pid=os.getpid(), host=host)
    limit = folder.config().bus.max_message_bytes
    client = BusClient(record.address, hello, max_message_bytes=limit, keys=record.client_keys("learner"))
    client.connect(CONNECT_S)
    return LearnerBus(client)


def consequences() -> tuple[type[BaseException], ...]:
    from learner.bus import RunStoppedError

    return (RunStoppedError, BusLost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--memory-copies", type=Path, metavar="DIR", help="in shared memory; without it there are none")
    parser.add_argument("--host", default="", help="this machine's address, where the broker is on another")
    args = parser.parse_args()
    folder = RunFolder(args.run_dir)
    rank = int(os.environ.get("RANK", "0"))
    role = "learner" if rank == 0 else f"learner-rank{rank}"
    return role_main(role, folder.error_file(role), lambda: learn(folder, args.memory_copies, args.host), consequences)


if __name__ == "__main__":
    run_as_program(main)
