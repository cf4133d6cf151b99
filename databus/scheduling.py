"""What the broker may be composed with to schedule by difficulty; it knows nothing of difficulty itself."""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, Protocol

from databus.groups import Group


class Scheduler(Protocol):
    """Knows how long problems will take. The broker tells it all that happens to a cursor, and asks."""

    def predicted_tokens(self, cursor: int) -> int:
        """Expected length of a completion of the prompt at `cursor`; 0: not known."""
        ...

    def completed(self, cursor: int, group: Group) -> None:
        """A group came in, whatever becomes of it."""
        ...

    def stepped(self, trained: Sequence[int], still_open: Set[int]) -> dict[str, float]:
        """A step trained these cursors; others that are not open any more were dropped.

        Returns: metrics for the step's row. A cursor neither trained nor open is never asked for again.
        """
        ...

    def save(self) -> bytes:
        """All that it needs to go on from here."""
        ...

    def load(self, saved: bytes) -> None:
        """Go on from what `save` gave. Raises: ValueError where it does not fit."""
        ...


class Load(NamedTuple):
    """What a worker has to do.

    predicted_tokens: of the groups it holds (0 for those of unknown length). reported_tokens: of these, what it says
    it has generated. tokens_per_s: its speed, 0 while not known. free_groups: how many more it has credit for.
    """

    predicted_tokens: int
    reported_tokens: int
    tokens_per_s: float
    free_groups: int


Rank = tuple[float, ...]


class Placement(Protocol):
    def ranking(self, loads: Sequence[Load]) -> Callable[[Load], Rank]:
        """How workers are ranked this time: the lowest gets the next group, the first of equals, and is ranked anew.

        Args: loads: of the workers that may get one.
        """
        ...


class MostCredit:
    """The worker with the most credit: all fill up evenly."""

    def ranking(self, loads: Sequence[Load]) -> Callable[[Load], Rank]:
        return lambda load: (-load.free_groups,)
