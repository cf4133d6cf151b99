"""The way into an engine: shut while weights change, and shut for certain."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Door:
    """Requests come in one by one; whoever shuts it waits until nobody stands in it. Of one event loop.

    A request that was let in under one version and reached the engine under the next would find the old version's
    prefix cache, and be told the new version's number.
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._clear = asyncio.Event()
        self._clear.set()
        self._inside = 0

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()

    async def shut(self) -> None:
        """Nobody comes in from here on; returns once those who were coming in are inside."""
        self._open.clear()
        await self._clear.wait()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Inside, a request goes over to the engine; what is read of the version there holds until it is there."""
        while not self._open.is_set():  # it may be shut again before one who waited gets to run
            await self._open.wait()
        self._inside += 1
        self._clear.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._clear.set()
