"""`python -m echelon.roles.worker RUN_DIR --name NAME`: a rollout worker of the supervisor's."""

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from databus.address import reachable
from databus.client import BusClient
from databus.errors import BusLost
from databus.messages import Heartbeat, Hello
from databus.process import run_as_program
from echelon.config import RunConfig
from echelon.errors import SIGTERM_CODE, role_main
from echelon.run_folder import BusRecord, RunFolder

if TYPE_CHECKING:
    from rollout.engine.base import Snapshot
    from rollout.versions import Pull


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A run that a worker can join. reward_dir: what the reward's path is relative to. spare: as `Hello.spare`.

    turns: folder of the flags where learner and engines take turns on a device; None where they do not."""

    config: RunConfig
    bus: BusRecord
    reward_dir: Path
    spare: bool = False
    turns: Path | None = None


def work(run: Membership, name: str) -> None:
    """Until the broker says stop, or a signal comes. Raises: whatever ends a worker."""
    from rollout.run import WorkerRun, run_worker

    config, bus = run.config, run.bus
    settings = WorkerRun(
        model=config.model,
        seed=config.seed,
        group_size=config.group_size,
        reward_dir=run.reward_dir,
        draft=config.draft,
        pull=pull_through(bus),
        max_staleness=config.max_staleness,
        turns=None if run.turns is None else (run.turns, name),
    )

    def make_client(version: int, heartbeat: Callable[[], Heartbeat]) -> BusClient:
        hello = Hello(
            role="worker",
            name=name,
            run_id=bus.run_id,
            version=version,
            max_sequences=config.rollout.max_sequences,
            pid=os.getpid(),
            host=socket.gethostname(),
            spare=run.spare,
        )
        limit = config.bus.max_message_bytes
        keys = bus.client_keys("worker")
        return BusClient(bus.address, hello, max_message_bytes=limit, heartbeat=heartbeat, keys=keys)

    try:
        asyncio.run(run_worker(config.rollout, config.reward, settings, make_client))
    except asyncio.CancelledError:  # told to stop before it had started
        sys.exit(SIGTERM_CODE)


def pull_through(bus: BusRecord) -> "Pull":
    """Pulls weights with the worker's key; a weight server on every interface is looked for where the broker is."""
    from rollout.weights_in import Puller

    puller = Puller(keys=bus.client_keys("worker", server="learner"))

    def pull(address: str, version: int, num_bytes: int, stop: threading.Event) -> "Snapshot":
        return puller(reachable(address, bus.address), version, num_bytes, stop)

    return pull


def consequences() -> tuple[type[BaseException], ...]:
    from rollout.run import RunFailedError

    return (RunFailedError, BusLost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--name", required=True)
    parser.add_argument("--spare", action="store_true")
    parser.add_argument("--alone", action="store_true", help="RUN_DIR has what travels; is the rest on this machine?")
    args = parser.parse_args()
    folder = RunFolder(args.run_dir)

    def body() -> None:
        from rollout.engine.factory import import_engine

        config = folder.config()
        if args.alone:
            from echelon.joining import check_has_all_of

            check_has_all_of(config, folder.path)
        import_engine(config.rollout.engine)
        bus = folder.wait_for_bus(config.rollout.start_timeout_s)
        turns = folder.turns_of(config)
        work(Membership(config=config, bus=bus, reward_dir=folder.path, spare=args.spare, turns=turns), args.name)

    return role_main(args.name, folder.error_file(args.name), body, consequences)


if __name__ == "__main__":
    run_as_program(main)
