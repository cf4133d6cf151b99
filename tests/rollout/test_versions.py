"""Following the learner's versions while the learner dies and comes back."""

import asyncio
import threading
from typing import Any

import pytest

import rollout.versions
from databus.messages import Manifest, Mismatch, VersionAnnounced, VersionApplied, VersionRefused
from rollout.config import GateConfig
from rollout.engine.base import GateRefused, Snapshot, UpdateReport
from rollout.versions import VersionFollower
from rollout.weight_source import PullError, VersionGoneError

DEAD, ALIVE = "ipc://dead", "ipc://alive"


class Engine:
    version = 0

    async def drain(self) -> None: ...

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        self.version = snapshot.version
        return UpdateReport(pause_s=0.0)


class Fetched:
    """A snapshot that has nothing to close."""

    received_bytes = None

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


class Gated(Engine):
    """Its gate refuses some versions. tries: how often each came to it."""

    def __init__(self, *refused: int) -> None:
        self._refused = refused
        self.tries: list[int] = []

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        self.tries.append(snapshot.version)
        if snapshot.version in self._refused:
            raise GateRefused(snapshot.version, Mismatch(kl=0.5, difference=2.0), GateConfig())
        return await super().update(snapshot)


async def gated(engine: Gated, *messages: VersionAnnounced) -> list[tuple[str, int]]:
    """What is told, each message having been dealt with before the next."""
    told: list[VersionApplied | VersionRefused] = []
    follower = VersionFollower(engine, told.append, pull_from_the_living)  # type: ignore[arg-type]
    task = asyncio.ensure_future(follower.run())
    for message in messages:
        follower.announce(message)
        await asyncio.sleep(0.1)
        assert not task.done()
    task.cancel()
    assert all("mismatch gate" in message.reason for message in told if isinstance(message, VersionRefused))
    return [(type(message).__name__, message.version) for message in told]


def test_a_refused_version_is_not_tried_again_and_the_next_one_is() -> None:
    engine = Gated(*range(2, 9))
    told = asyncio.run(gated(engine, *(announced(version, ALIVE) for version in (1, 2, 3, 4, 5, 9))))
    assert told == [
        ("VersionApplied", 1),
        *(("VersionRefused", version) for version in (2, 3, 4, 5)),
        ("VersionApplied", 9),
    ]
    assert engine.tries == [1, 2, 3, 4, 5, 9]


def test_a_refusal_is_told_again_where_it_was_not_heard() -> None:
    engine = Gated(2)
    told = asyncio.run(gated(engine, announced(2, ALIVE), announced(2, ALIVE)))
    assert told == [("VersionRefused", 2)] * 2
    assert engine.tries == [2]


def test_the_version_of_another_learner_is_tried() -> None:
    engine = Gated(2)
    asyncio.run(gated(engine, announced(2, "ipc://before"), announced(2, ALIVE)))
    assert engine.tries == [2, 2]
