"""Groups that come in and are not kept, one after the other: the run looks alive, but no batch will ever be cut."""

from collections import Counter

from databus.groups import Group
from databus.run_state import RunFailed

NO_LOSS = "having no token that bears loss"


class DroppedInARow:
    """Counts since the last group that was kept; ends the run at `limit`, saying why groups were dropped."""

    def __init__(self, limit: int, batch_groups: int) -> None:
        self._limit = limit
        self._batch_groups = batch_groups
        self.kept()

    def kept(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._lowest, self._highest, self._spread = float("inf"), float("-inf"), 0.0

    def add(self, group: Group, reason: str) -> None:
        """One more. Raises: RunFailed, one line, if that makes `limit` of them."""
        lowest, highest = float(group.rewards.min()), float(group.rewards.max())
        self._reasons[reason] += 1
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, highest)
        self._spread = max(self._spread, highest - lowest)
        if self._reasons.total() >= self._limit:
            raise RunFailed(self._message())

    def _message(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        return (
            f"{self._limit} groups in a row ({self._limit / self._batch_groups:.3g} batches) were dropped, none kept: "
            f"{reasons}; rewards were {self._lowest:g} to {self._highest:g}, at most {self._spread:g} apart within a "
            "group (scheduling.max_filtered bounds how many; scheduling.drop_zero_variance drops groups whose rewards "
            "are all equal)"
        )
