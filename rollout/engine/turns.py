"""An engine that computes only in its turns on a device that it shares with the learner (`placement=colocated`)."""

import asyncio
import logging
import time

from databus.turns import EngineTurn
from rollout.engine.base import Completion, Engine, EngineDead, EngineStats, GenerateRequest, Snapshot, UpdateReport

logger = logging.getLogger(__name__)

POLL_S = 0.01


class TurnEngine:
    """Another engine, which sleeps while the learner wants the device. `take_turns` must run beside all else.

    Requests are taken at any time, and those in flight go on in the next turn; versions are served in turns only.
    """

    def __init__(self, engine: Engine, turn: EngineTurn, start_timeout_s: float) -> None:
        """Args: start_timeout_s: how long to wait for a turn to start in."""
        self._engine = engine
        self._turn = turn
        self._start_timeout_s = start_timeout_s
        self._awake = asyncio.Event()
        self._changing = asyncio.Lock()
        """Held while a version is being served, and while the engine falls asleep or wakes up."""

    @property
    def version(self) -> int:
        return self._engine.version

    async def start(self) -> None:
        """Loading takes the device, too, so it waits for a turn."""
        deadline = time.monotonic() + self._start_timeout_s
        while not self._turn.try_take():
            if time.monotonic() > deadline:
                raise EngineDead(f"the learner did not give up the device within {self._start_timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        await self._engine.start()
        self._awake.set()

    async def take_turns(self) -> None:
        """Never returns. Raises: EngineDead."""
        while True:
            if not self._awake.is_set():
                await self._take_turn()
            elif self._turn.is_wanted:
                await self._give_turn()
            await asyncio.sleep(POLL_S)

    async def _take_turn(self) -> None:
        if not self._turn.try_take():
            return
        async with self._changing:
            await self.wake()
            self._awake.set()

    async def _give_turn(self) -> None:
        started = time.monotonic()
        async with self._changing:  # a version that is being loaded is loaded first
            await self.sleep()
            self._awake.clear()
        self._turn.give()
        logger.debug("asleep after %.3f s", time.monotonic() - started)

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        return await self._engine.generate(request)

    async def drain(self) -> None:
        """Waits for a turn as well: who calls it sends what ends meanwhile, and nothing while `update` goes on."""
        await self._awake.wait()
        await self._engine.drain()

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        while True:
            await self._awake.wait()
            async with self._changing:
                if self._awake.is_set():
                    return await self._engine.update(snapshot)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def close(self) -> None:
        """The device is the learner's only once nothing of the engine is left."""
        try:
            await self._engine.close()
        finally:
            self._turn.close()
