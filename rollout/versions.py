"""Follows the learner's versions: pulls the newest one announced, and has the engine serve it."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

from databus.messages import VersionAnnounced, VersionApplied, VersionRefused
from rollout.config import UpdateConfig
from rollout.delay import Delay
from rollout.engine.base import Engine, GateRefused, Snapshot, UpdateFailed
from rollout.weight_source import PullError, VersionGoneError
from rollout.weights_in import pull_snapshot

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
GONE_TIMEOUT_S = 300.0

Pull = Callable[[str, int, int, threading.Event], Snapshot]
Tell = Callable[[VersionApplied | VersionRefused], None]


class VersionFollower:
    """Generation goes on while a version is pulled; versions that are overtaken meanwhile are never pulled."""

    def __init__(self, engine: Engine, tell: Tell, pull: Pull = pull_snapshot, delay: Delay | None = None) -> None:
        """Args: tell: told of every version that the engine serves from now on, before any group that has it, and of
        those that it has refused. delay: None: a version is served as soon as it is there."""
        self._engine = engine
        self._delay = delay or Delay(UpdateConfig(), None)
        self._tell = tell
        self._pull = pull
        self._newest: VersionAnnounced | None = None
        self._refused: tuple[VersionAnnounced, VersionRefused] | None = None
        self._announced = asyncio.Event()
        self._switch = asyncio.Lock()
        self._stop_pull = threading.Event()

    def announce(self, message: VersionAnnounced) -> None:
        """A learner that came back serves from another address, at first older versions; the old one is silent.

        A version that is announced again although it was refused: the broker has not heard of that.
        """
        newest = self._newest
        if self._refused is not None and self._has_refused(message):
            self._tell(self._refused[1])
        has_moved = newest is not None and message.address != newest.address
        if newest is None or has_moved or message.version > newest.version:
            self._newest = message
            self._announced.set()
        if has_moved:
            self._stop_pull.set()

    @contextlib.asynccontextmanager
    async def steady(self) -> AsyncIterator[None]:
        """No version is being switched to inside: what is sent comes after the notice of the versions it has."""
        async with self._switch:
            yield

    async def run(self) -> None:
        """Never returns. Raises: EngineDead; PullError or UpdateFailed once a version has failed three times."""
        failures = 0
        while True:
            target = await self._next()
            try:
                await self._apply(target)
                failures = 0
            except VersionGoneError as error:
                logger.warning("%s; waiting for a newer one", error)
                await self._other_than(target)
            except GateRefused as error:
                failures = 0
                logger.warning("serving version %d still: %s", self._engine.version, error)
                refusal = VersionRefused(version=target.version, mismatch=error.mismatch, reason=error.reason)
                self._refused = (target, refusal)
                self._tell(refusal)
            except (PullError, UpdateFailed) as error:
                if self._has_moved(target):
                    continue
                failures += 1
                logger.warning("serving version %d still: %s", self._engine.version, error)
                if failures == MAX_FAILURES:
                    raise

    async def _next(self) -> VersionAnnounced:
        while (newest := self._newest) is None or newest.version <= self._engine.version or self._has_refused(newest):
            self._announced.clear()
            await self._announced.wait()
        return newest

    def _has_refused(self, announced: VersionAnnounced) -> bool:
        return self._refused is not None and self._refused[0] == announced

    def _has_moved(self, target: VersionAnnounced) -> bool:
        return self._newest is not None and self._newest.address != target.address

    async def _other_than(self, gone: VersionAnnounced) -> None:
        try:
            async with asyncio.timeout(GONE_TIMEOUT_S):
                while self._newest is gone:
                    self._announced.clear()
                    await self._announced.wait()
        except TimeoutError:
            raise PullError(f"version {gone.version} is gone, and no newer one came in {GONE_TIMEOUT_S:g} s") from None

    async def _apply(self, target: VersionAnnounced) -> None:
        started = time.monotonic()
        self._stop_pull = stop = threading.Event()
        try:
            snapshot = await asyncio.to_thread(self._pull, target.address, target.version, target.num_bytes, stop)
        finally:
            stop.set()  # a cancelled task leaves its thread behind
        try:
            delay_s = await self._delay.wait(self._engine.version, lambda: self._newest_of(target))
            await self._engine.drain()  # what ends meanwhile is sent meanwhile
            async with self._switch:
                report = await self._engine.update(snapshot)
                self._tell(
                    VersionApplied(
                        version=target.version,
                        pause_s=report.pause_s,
                        sync_s=time.monotonic() - started - delay_s,
                        received_bytes=(
                            target.num_bytes if snapshot.received_bytes is None else snapshot.received_bytes
                        ),
                        mismatch=report.mismatch,
                        delay_s=delay_s,
                    )
                )
        finally:
            snapshot.close()
        logger.info("version %d applied, pause %.3f s, put off %.1f s", target.version, report.pause_s, delay_s)

    def _newest_of(self, target: VersionAnnounced) -> int:
        newest = self._newest or target
        return newest.version
