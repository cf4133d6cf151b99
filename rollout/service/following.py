"""Follows a run from outside: its versions are taken up as they are published, and it never hears of it."""

import asyncio
import contextlib
from typing import Any, Protocol, cast

from databus.errors import BusError
from databus.messages import VersionAnnounced
from rollout.engine.base import Engine, EngineDead, Snapshot, UpdateFailed, UpdateReport
from rollout.versions import Pull, Tell, VersionFollower
from rollout.weight_source import PullError

LOOK_EVERY_S = 0.25


class RunSource(Protocol):
    """A run, seen as an observer. Nothing of it blocks but `close`, which takes a moment.

    name: for people. pull: fetches a version from where it was announced.
    """

    name: str
    dtype: str
    pull: Pull

    def newest(self) -> VersionAnnounced | None:
        """What was published last, as far as is known. Raises: BusError, one line, once the run is over or gone."""
        ...

    def close(self) -> None: ...


class Following:
    """Until the run is over, `stop` is called, or versions cannot be had any more; what was served last serves on."""

    def __init__(self, engine: Engine, source: RunSource, pull: Pull, tell: Tell) -> None:
        """Args: pull: `source.pull`, or what makes whole weights of it. tell: of each version applied or refused."""
        self.source = source
        self.newest: int | None = None
        self._versions = VersionFollower(cast(Engine, _OtherVersions(engine)), tell, pull)
        self._task: asyncio.Task[str] | None = None

    def start(self) -> "asyncio.Task[str]":
        """The task says, in one line, why it ended. Raises, in the task: EngineDead."""
        self._task = asyncio.ensure_future(self._run())
        return self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> str:
        loops = [asyncio.ensure_future(each) for each in (self._look(), self._versions.run())]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            return _why(next(iter(done)))
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            with contextlib.suppress(BusError):
                await asyncio.shield(asyncio.to_thread(self.source.close))

    async def _look(self) -> None:
        while True:
            announced = self.source.newest()
            if announced is not None:
                self.newest = announced.version
                self._versions.announce(announced)
            await asyncio.sleep(LOOK_EVERY_S)


def _why(ended: "asyncio.Future[None]") -> str:
    error = ended.exception()
    assert error is not None, "neither loop returns"
    if isinstance(error, BusError | PullError | UpdateFailed) and not isinstance(error, EngineDead):
        return str(error)
    raise error


class _OtherVersions:
    """An engine whose versions so far are of another run, or of none: all of this one are newer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._version = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def version(self) -> int:
        return self._version

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        report = await self._engine.update(snapshot)
        self._version = snapshot.version
        return report
