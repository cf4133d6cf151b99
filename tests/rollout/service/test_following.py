"""Following a run, with a run and an engine that do as they are told."""

import asyncio
import threading
from typing import Any

import pytest

import rollout.service.following
from databus.errors import BusLost
from databus.messages import Manifest, VersionAnnounced, VersionApplied
from rollout.engine.base import EngineDead, UpdateReport
from rollout.service.following import Following
from rollout.weight_source import PullError


class Fetched:
    """A snapshot that has nothing to close."""

    received_bytes = None

    def __init__(self, version: int) -> None:
        self.version = version
        self.manifest = Manifest(version=version, num_bytes=1, chunk_bytes=1, tensors=())

    def close(self) -> None: ...


class Engine:
    """It serves version 7, of something else."""

    version = 7

    async def drain(self) -> None: ...

    async def update(self, snapshot: Any) -> UpdateReport:
        if snapshot.version == 13:
            raise EngineDead("no more")
        self.version = snapshot.version
        return UpdateReport(pause_s=0.25)


class Run:
    """Publishes one version after another, whenever it is asked; then it is over."""

    name, dtype = "a run", "float32"

    def __init__(self, *versions: int) -> None:
        self._versions = list(versions)
        self.closed_in: threading.Thread | None = None

    def newest(self) -> VersionAnnounced:
        if not self._versions:
            raise BusLost("the run has finished")
        return VersionAnnounced(version=self._versions.pop(0), address="ipc://there", num_bytes=1)

    def pull(self, address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
        if version == 666:
            raise PullError("no such luck")
        return Fetched(version)

    def close(self) -> None:
        self.closed_in = threading.current_thread()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.service.following, "LOOK_EVERY_S", 0.05)


async def follow(run: Run) -> tuple[str, list[int]]:
    """(why it ended, versions applied)"""
    applied: list[int] = []

    def tell(message: Any) -> None:
        assert isinstance(message, VersionApplied)
        applied.append(message.version)

    following = Following(Engine(), run, run.pull, tell)  # type: ignore[arg-type]
    async with asyncio.timeout(10.0):
        return await following.start(), applied


def test_smaller_versions_of_another_run_are_taken_up() -> None:
    run = Run(2, 3, 3, 5, 5, 5)
    assert asyncio.run(follow(run)) == ("the run has finished", [2, 3, 5])
    assert run.closed_in not in (None, threading.main_thread())


def test_what_cannot_be_pulled_ends_it_and_is_said() -> None:
    run = Run(2, *[666] * 100)
    assert asyncio.run(follow(run)) == ("no such luck", [2])
    assert run.closed_in is not None


def test_a_dead_engine_is_not_kept_quiet() -> None:
    run = Run(2, *[13] * 100)
    with pytest.raises(EngineDead):
        asyncio.run(follow(run))
    assert run.closed_in is not None


def test_stop_lets_go_of_the_run() -> None:
    run = Run(*[2] * 1000)

    async def scenario() -> None:
        following = Following(Engine(), run, run.pull, lambda message: None)  # type: ignore[arg-type]
        task = following.start()
        while following.newest is None:
            await asyncio.sleep(0.01)
        await following.stop()
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(scenario(), 10.0))
    assert run.closed_in is not None
