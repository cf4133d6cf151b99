"""The rollout worker: takes leases, answers each with a scored group, and follows the learner's versions.

It keeps nothing that cannot be lost: what it holds when it dies is leased again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence, Set
from typing import NamedTuple, Protocol

from msgspec import Struct

from databus.client import Arrived
from databus.codec import Frame
from databus.errors import BusError
from databus.messages import (
    Ack,
    Cancel,
    Completed,
    Credits,
    Drain,
    Failed,
    Holding,
    Lease,
    Leaving,
    Refused,
    Released,
    Stop,
    VersionAnnounced,
    VersionApplied,
    VersionRefused,
    Welcome,
)
from rollout.config import UpdateConfig
from rollout.credit import credit_groups
from rollout.delay import Delay, Postponable
from rollout.lease_work import LeaseWork, Outcome
from rollout.leaving import Durations, nearly_done
from rollout.versions import Pull, VersionFollower
from rollout.weights_in import pull_snapshot

logger = logging.getLogger(__name__)

RESEND_S = 10.0
DRAIN_S = 20.0
LAST_ACKS_S = 5.0
POLL_S = 0.05


class WorkerRefusedError(Exception):
    """The broker does not take this worker, or something it sent."""


class Bus(Protocol):
    """A connection to the broker that has said hello and sends heartbeats by itself: `databus.client.BusClient`."""

    def send(self, message: Struct, frames: Sequence[Frame] = ()) -> None:
        """Raises: BusError where the connection has failed."""
        ...

    async def recv_async(self) -> Arrived:
        """Raises: BusError where the connection has failed."""
        ...


class _Unsettled(NamedTuple):
    """A result that the broker has not acknowledged."""

    outcome: Outcome
    sent: float


class Worker:
    """One engine's leases. `run` until the broker stops it, `leave` or `stop` is called, or something breaks."""

    def __init__(
        self,
        bus: Bus,
        work: LeaseWork,
        *,
        group_size: int,
        max_sequences: int,
        ahead: float = 0.0,
        pull: Pull = pull_snapshot,
        drain_s: float = DRAIN_S,
        update: UpdateConfig = UpdateConfig(),  # noqa: B008
        max_staleness: int = 0,
        beside: Sequence[Callable[[], Coroutine[None, None, None]]] = (),
    ) -> None:
        """Args: ahead: groups to hold beyond those that `max_sequences` has room for, as a share of these.
        drain_s: how long a worker that leaves goes on with what it has begun. update, max_staleness: how long a new
        version may be put off. beside: what has to run as long as the worker does, and ends it where it fails.
        """
        self._bus = bus
        self._capacity = credit_groups(max_sequences, group_size, ahead)
        self._work = work
        room = credit_groups(max_sequences, group_size, ahead=0.0)
        postponable = Postponable(
            max_staleness=max_staleness,
            under_way=lambda: self._in_engine,
            is_full=lambda: len(self._in_engine) >= room,
        )
        self._versions = VersionFollower(work.engine, self._switched, pull, Delay(update, postponable))
        self._running: dict[str, asyncio.Task[None]] = {}
        self._unsettled: dict[str, _Unsettled] = {}
        self._in_engine: set[str] = set()
        self._freed = 0
        self._version = work.engine.version
        self._durations = Durations()
        self._drain_s = drain_s
        self._beside = beside
        self._leaving = ""
        self._told_to_leave = asyncio.Event()
        self._end: asyncio.Future[Stop] | None = None

    async def run(self) -> Stop:
        """Why it ended: the broker's `Stop`, or what `leave` or `stop` was told.

        Raises: BusError; EngineDead; PullError; UpdateFailed; WorkerRefusedError: one line for a person each.
        """
        self._end = asyncio.get_running_loop().create_future()
        self._grant()
        own = (self._listen(), self._versions.run(), self._resend(), self._leave_when_told())
        work = (*own, *(start() for start in self._beside))
        loops = [asyncio.ensure_future(each) for each in work]
        try:
            return await self._first_end(loops)
        finally:
            await _cancel([*loops, *self._running.values()])

    def leave(self, reason: str) -> None:
        """End `run` once what is nearly done is done; take nothing more. A second time: at once."""
        if self._leaving:
            self.stop(reason)
            return
        self._leaving = reason
        self._told_to_leave.set()

    def stop(self, reason: str) -> None:
        """End `run` at once: what is unfinished goes back to the broker. Call it in the event loop, as `leave`."""
        if self._end is None or self._end.done():
            return
        self._end.set_result(Stop(reason=reason))
        with contextlib.suppress(BusError):  # `run` tells of it
            self._hand_back(set(self._running))

    async def _leave_when_told(self) -> None:
        await self._told_to_leave.wait()
        self._bus.send(Leaving(reason=self._leaving))
        kept = nearly_done(self._durations.ages(), self._durations.usual(), self._drain_s)
        logger.info("leaving (%s): finishing %d of %d groups", self._leaving, len(kept), len(self._running))
        self._hand_back(self._running.keys() - kept)
        await _wait_while(lambda: bool(self._running), self._drain_s)
        self._hand_back(set(self._running))
        await _wait_while(lambda: bool(self._unsettled), LAST_ACKS_S)
        self._finish(Stop(reason=self._leaving))

    def _hand_back(self, group_ids: Set[str]) -> None:
        if not group_ids:
            return
        self._bus.send(Released(group_ids=tuple(group_ids)))
        for group_id in group_ids:
            self._drop(group_id)

    async def _first_end(self, loops: "Sequence[asyncio.Future[None]]") -> Stop:
        assert self._end is not None
        done, _ = await asyncio.wait([self._end, *loops], return_when=asyncio.FIRST_COMPLETED)
        for failed in done:
            failed.result()
        return self._end.result()

    # ------------------------------------------------------------ what the broker says

    async def _listen(self) -> None:
        while True:
            arrived = await self._bus.recv_async()
            self._handle(arrived.message, arrived.frames)

    def _handle(self, message: Struct, frames: Sequence[Frame]) -> None:
        match message:
            case Lease():
                self._take(message, frames)
            case Cancel(group_ids=group_ids):
                for group_id in group_ids:
                    self._drop(group_id)
            case Ack(group_id=group_id, accepted=accepted, reason=reason):
                self._unsettled.pop(group_id, None)
                if not accepted:
                    logger.info("group %s was not taken: %s", group_id, reason)
            case VersionAnnounced():
                self._versions.announce(message)
            case Drain(reason=reason):
                self._told_to_leave.set()
                self._leaving = self._leaving or reason
            case Welcome():
                self._rejoined()
            case Stop():
                self._finish(message)
            case Refused(reason=reason):
                raise WorkerRefusedError(f"the broker refused this worker: {reason}")

    def _finish(self, stop: Stop) -> None:
        assert self._end is not None
        if not self._end.done():
            self._end.set_result(stop)

    # ------------------------------------------------------------ leases

    def _take(self, lease: Lease, frames: Sequence[Frame]) -> None:
        if lease.group_id in self._running or lease.group_id in self._unsettled:
            return  # a copy
        if self._leaving:  # it was on its way already
            self._bus.send(Released(group_ids=(lease.group_id,)))
            return
        self._durations.begin(lease.group_id)
        if lease.purpose == "train":
            self._in_engine.add(lease.group_id)
        self._running[lease.group_id] = task = asyncio.ensure_future(self._answer(lease, frames))
        task.add_done_callback(lambda done: self._done(lease.group_id, done))

    async def _answer(self, lease: Lease, frames: Sequence[Frame]) -> None:
        outcome = await self._work.run(lease, generated=lambda: self._free(lease.group_id), frames=frames)
        async with self._versions.steady():
            self._send(lease.group_id, outcome)

    def _done(self, group_id: str, task: "asyncio.Task[None]") -> None:
        if self._running.get(group_id) is task:
            del self._running[group_id]
        self._durations.end(group_id, completed=group_id in self._unsettled)
        if self._end is None or self._end.done():
            return
        self._free(group_id)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._end.set_exception(error)

    def _drop(self, group_id: str) -> None:
        self._unsettled.pop(group_id, None)
        task = self._running.get(group_id)
        if task is not None:
            task.cancel()

    def _free(self, group_id: str) -> None:
        """A group's room in the engine is given back as soon as it is generated, so that scoring keeps none idle."""
        if group_id in self._in_engine:
            self._in_engine.discard(group_id)
            self._freed += 1
            if not self._leaving:
                self._grant()

    def _grant(self) -> None:
        self._bus.send(Credits(total=self._capacity + self._freed))

    def _holding(self) -> Holding:
        group_ids = (*self._running, *self._unsettled)
        return Holding(group_ids=group_ids, credits=self._capacity + self._freed, version=self._version)

    # ------------------------------------------------------------ what goes out

    def _send(self, group_id: str, outcome: Outcome) -> None:
        message, frames = outcome
        self._bus.send(message, frames)
        if isinstance(message, Completed | Failed):
            self._unsettled[group_id] = _Unsettled(outcome, time.monotonic())

    async def _resend(self) -> None:
        """Results stay here until they are acknowledged: a broker that came back may have lost them."""
        while True:
            await asyncio.sleep(RESEND_S / 4)
            self._bus.send(self._holding())
            now = time.monotonic()
            for group_id, unsettled in list(self._unsettled.items()):
                if now - unsettled.sent > RESEND_S:
                    self._send(group_id, unsettled.outcome)

    def _rejoined(self) -> None:
        """The broker is a new one, or had given this worker up: credits count anew, and what was sent may be lost."""
        self._bus.send(self._holding())
        for group_id, unsettled in list(self._unsettled.items()):
            self._send(group_id, unsettled.outcome)
        self._freed = -len(self._in_engine)
        if not self._leaving:
            self._grant()

    def _switched(self, message: VersionApplied | VersionRefused) -> None:
        if isinstance(message, VersionApplied):
            self._version = message.version
        self._bus.send(message)


async def _wait_while(waiting: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while waiting() and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)


async def _cancel(tasks: "Sequence[asyncio.Future[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
