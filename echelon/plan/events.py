"""Simulated time: what is due, in its order."""

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class Events:
    """A clock that stands still while something happens, and jumps to what is due next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Action]] = []
        self._order = count()

    def clock(self) -> float:
        """Seconds since the start; for whoever would ask `time.monotonic`."""
        return self.now

    def at(self, time: float, action: Action) -> None:
        """What is due at one time happens in the order in which it was asked for."""
        heapq.heappush(self._queue, (max(time, self.now), next(self._order), action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def next(self) -> bool:
        """Let the next thing happen. Returns: False where nothing is due any more."""
        if not self._queue:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        action()
        return True
