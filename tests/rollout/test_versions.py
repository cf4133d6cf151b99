"""Following the learner's versions while the learner dies and comes back."""

import asyncio
import threading
from typing import Any

import pytest

import rollout.versions
from databus.messages import Manifest, VersionAnnounced
from rollout.engine.base import Snapshot, UpdateReport
from rollout.versions import VersionFollower
from rollout.weights_in import PullError, VersionGoneError

DEAD, ALIVE = "ipc://dead", "ipc://alive"


class Engine:
    version = 0

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        self.version = snapshot.version
        return UpdateReport(pause_s=0.0)


class Fetched:
    """A snapshot that has nothing to close."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.manifest = Manifest(version=version, num_bytes=1, chunk_bytes=1, tensors=())

    def close(self) -> None: ...


def announced(version: int, address: str) -> VersionAnnounced:
    return VersionAnnounced(version=version, address=address, num_bytes=1)


async def follow(pull: Any, *messages: VersionAnnounced, until: int) -> Engine:
    """Each message comes once the one before has been waited for by a pull; ends once `until` is served."""
    engine = Engine()
    follower = VersionFollower(engine, lambda message: None, pull)  # type: ignore[arg-type]
    task = asyncio.ensure_future(follower.run())
    try:
        async with asyncio.timeout(5.0):
            for message in messages:
                follower.announce(message)
                await asyncio.sleep(0.1)
                if task.done():
                    task.result()
            while engine.version != until:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
    return engine


def pull_from_the_living(address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
    if address == DEAD:
        stop.wait(60.0)  # as long as a pull waits for an answer
        raise PullError("silent")
    return Fetched(version)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_pull_from_a_learner_that_died_ends_when_another_takes_its_place(version: int) -> None:
    engine = asyncio.run(follow(pull_from_the_living, announced(2, DEAD), announced(version, ALIVE), until=version))
    assert engine.version == version


def test_learners_that_died_are_no_failures_of_the_worker() -> None:
    dead = [announced(2, f"{DEAD}-{life}") for life in range(2 * rollout.versions.MAX_FAILURES)]

    def pull(address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
        return pull_from_the_living(DEAD if address != ALIVE else ALIVE, version, num_bytes, stop)

    assert asyncio.run(follow(pull, *dead, announced(2, ALIVE), until=2)).version == 2


def test_a_version_that_is_gone_is_taken_from_the_learner_that_came_back() -> None:
    def pull(address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
        if address == DEAD:
            raise VersionGoneError("gone")
        return Fetched(version)

    assert asyncio.run(follow(pull, announced(2, DEAD), announced(2, ALIVE), until=2)).version == 2


def test_a_server_that_fails_again_and_again_ends_the_worker() -> None:
    def pull(address: str, version: int, num_bytes: int, stop: threading.Event) -> Any:
        raise PullError("broken")

    with pytest.raises(PullError, match="broken"):
        asyncio.run(follow(pull, announced(2, ALIVE), until=2))
