"""How a worker leaves: which groups it still finishes, and which it hands back at once."""

import statistics
import time
from collections import deque
from collections.abc import Mapping

REMEMBERED_GROUPS = 64


class Durations:
    """How long groups are under way, from lease to result, and since when those are that have none yet. Seconds."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._done: deque[float] = deque(maxlen=REMEMBERED_GROUPS)

    def begin(self, group_id: str) -> None:
        self._started[group_id] = time.monotonic()

    def end(self, group_id: str, completed: bool) -> None:
        """It is under way no more. Only groups that were `completed` say how long one takes."""
        started = self._started.pop(group_id, None)
        if started is not None and completed:
            self._done.append(time.monotonic() - started)

    def ages(self) -> dict[str, float]:
        now = time.monotonic()
        return {group_id: now - started for group_id, started in self._started.items()}

    def usual(self) -> float | None:
        """The median; None before the first is done."""
        return statistics.median(self._done) if self._done else None


def nearly_done(ages: Mapping[str, float], usual: float | None, within_s: float) -> set[str]:
    """The groups that are likely to be done within `within_s`; all of them where nothing is known of that.

    Args: ages: of the groups under way. usual: how old a group is when it is done. All in seconds.
    """
    return {group_id for group_id, age in ages.items() if usual is None or usual - age <= within_s}
