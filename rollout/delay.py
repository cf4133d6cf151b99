"""Delayed updates: a version that is at hand waits for the groups under way.

Source: AsyncFlow (arXiv:2507.01663), delayed parameter update.
"""

import asyncio
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

from rollout.config import UpdateConfig

POLL_S = 0.05
STARVED_S = 0.5
"""An engine that has not been full for so long is given nothing to do because its version is old."""


@dataclass(frozen=True, kw_only=True)
class Postponable:
    """What a delay is measured by. max_staleness: of the run. under_way: group ids in the engine. is_full: whether
    the engine has as many groups as it has room for."""

    max_staleness: int
    under_way: Callable[[], Set[str]]
    is_full: Callable[[], bool]


class Delay:
    """Puts off versions, as `rollout.update.delay` says. Nothing depends on it: groups carry the versions that sampled
    them, and the broker gives no lease to a worker that has not applied what it was told of."""

    def __init__(self, config: UpdateConfig, work: Postponable | None) -> None:
        self._config = config
        self._work = work

    async def wait(self, served: int, newest: Callable[[], int]) -> float:
        """Until the groups have ended that are under way now, or it may not or need not be put off any longer.

        Args: served: the version that the engine has. newest: the newest announced one. Returns: seconds waited.
        """
        started = filled = time.monotonic()
        work = self._work
        if self._config.delay == "none" or work is None:
            return 0.0
        waited_for = frozenset(work.under_way())
        while (
            # With a version more between them, no group that is begun now could be trained in time.
            newest() - served < work.max_staleness
            and not waited_for.isdisjoint(work.under_way())
            and time.monotonic() - started < self._config.delay_s
        ):
            now = time.monotonic()
            filled = now if work.is_full() else filled
            if now - filled > STARVED_S:
                break
            await asyncio.sleep(POLL_S)
        return time.monotonic() - started
