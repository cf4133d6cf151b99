"""Where every group of a run stands: in exactly one state, moved only along the allowed edges.

    leased ──▶ completed ──▶ trained | stale | filtered | failed
      │  ╲        ▲
      │   ╲───▶ failed, expired
      └──▶ expired ──▶ completed (late), or the cursor is leased again as another attempt

Settled groups are only counted: any group id that is not open has been settled, or never existed.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import xxhash

State = Literal["leased", "completed", "trained", "stale", "filtered", "failed", "expired"]

EDGES: dict[State, frozenset[State]] = {
    "leased": frozenset({"completed", "failed", "expired"}),
    "expired": frozenset({"completed"}),
    "completed": frozenset({"trained", "stale", "filtered", "failed"}),
}
SETTLED: tuple[State, ...] = ("trained", "stale", "filtered", "failed")


@dataclass
class Entry:
    """An open group.

    order: place among all leases of the run. next_attempt: the first of its cursor that was never leased.
    step: the batch that holds it, once cut.
    """

    group_id: str
    cursor: int
    attempt: int
    order: int
    next_attempt: int
    state: State = "leased"
    step: int | None = None


OnTransition = Callable[[Entry, State], None]


def group_id_of(run_id: str, cursor: int, attempt: int) -> str:
    return xxhash.xxh3_128_hexdigest(f"{run_id}/{cursor}/{attempt}".encode())


class Ledger:
    """Every transition is told to `on_transition` before it is made: that is where a journal hangs on."""

    def __init__(
        self,
        run_id: str,
        next_cursor: int = 0,
        pending: Iterable[tuple[int, int]] = (),
        counts: dict[str, int] | None = None,
        on_transition: OnTransition = lambda entry, state: None,
    ) -> None:
        self._run_id = run_id
        self._next_cursor = next_cursor
        self._pending = deque(pending)
        self._on_transition = on_transition
        self._open: dict[str, Entry] = {}
        self._attempts: dict[int, dict[str, Entry]] = {}
        self._settled = Counter({state: (counts or {}).get(state, 0) for state in SETTLED})
        self._expiries = (counts or {}).get("expired", 0)
        self._num_leases = 0
        self._by_state: Counter[State] = Counter()

    @property
    def next_cursor(self) -> int:
        return self._next_cursor

    @property
    def running(self) -> int:
        """Groups leased."""
        return self._by_state["leased"]

    @property
    def completed(self) -> int:
        """Groups completed and not settled yet: they wait, or their batch is being trained."""
        return self._by_state["completed"]

    @property
    def accepted(self) -> int:
        """Groups trained, or completed and not settled yet."""
        return self._settled["trained"] + self.completed

    def counts(self) -> dict[str, int]:
        """Totals since the run's start: settled groups by state, and leases that expired."""
        return {**self._settled, "expired": self._expiries}

    def get(self, group_id: str) -> Entry | None:
        """The entry of a group that is not settled."""
        return self._open.get(group_id)

    @property
    def num_leases(self) -> int:
        """Of the run, so far."""
        return self._num_leases

    @property
    def to_lease(self) -> tuple[tuple[int, int], ...]:
        """(cursor, attempt) of the leases to come before any new cursor."""
        return tuple(self._pending)

    def open_entries(self) -> tuple[Entry, ...]:
        """In the order of their leases."""
        return tuple(sorted(self._open.values(), key=lambda entry: entry.order))

    def load(
        self,
        entries: Iterable[Entry],
        next_cursor: int,
        to_lease: Iterable[tuple[int, int]],
        counts: Mapping[str, int],
        num_leases: int,
    ) -> None:
        """Stand where a ledger stood that had these `open_entries`, and otherwise what its properties said."""
        self._next_cursor, self._num_leases = next_cursor, num_leases
        self._pending = deque(to_lease)
        self._settled = Counter({state: counts.get(state, 0) for state in SETTLED})
        self._expiries = counts.get("expired", 0)
        for entry in entries:
            self._open[entry.group_id] = entry
            self._attempts.setdefault(entry.cursor, {})[entry.group_id] = entry
            self._by_state[entry.state] += 1

    def lease(self) -> Entry:
        """Lease the next cursor: one whose lease went wrong first, else a new one."""
        if self._pending:
            cursor, attempt = self._pending.popleft()
        else:
            cursor, attempt = self._next_cursor, 0
            self._next_cursor += 1
        group_id = group_id_of(self._run_id, cursor, attempt)
        entry = Entry(group_id, cursor, attempt, self._num_leases, next_attempt=attempt + 1)
        self._on_transition(entry, "leased")
        self._num_leases += 1
        self._open[entry.group_id] = entry
        self._attempts.setdefault(cursor, {})[entry.group_id] = entry
        self._by_state["leased"] += 1
        return entry

    def expire(self, entry: Entry) -> None:
        """The lease is lost; its cursor is leased again before new ones, and a late result is still welcome."""
        self._move(entry, "expired")
        self._expiries += 1
        self._pending.append((entry.cursor, entry.next_attempt))

    def complete(self, entry: Entry) -> list[Entry]:
        """The result is in. Returns: other attempts of the cursor that were under way, which nobody needs any more."""
        self._move(entry, "completed")
        others = [other for other in self._attempts[entry.cursor].values() if other is not entry]
        for other in others:
            # The cursor may have to be leased again, and never under an id that somebody may still answer.
            entry.next_attempt = max(entry.next_attempt, other.next_attempt)
            if other.state == "leased":
                self._move(other, "expired")
                self._expiries += 1
            self._forget(other)
        self._pending = deque(item for item in self._pending if item[0] != entry.cursor)
        return others

    def settle(self, entry: Entry, state: Literal["trained", "stale", "filtered", "failed"]) -> None:
        self._move(entry, state)
        self._settled[state] += 1
        for other in list(self._attempts[entry.cursor].values()):
            self._forget(other)
        self._pending = deque(item for item in self._pending if item[0] != entry.cursor)

    def requeue(self, entry: Entry) -> None:
        """Settle as stale, and lease the cursor once more."""
        self.settle(entry, "stale")
        self._pending.append((entry.cursor, entry.next_attempt))

    def pending_at(self, step: int) -> tuple[tuple[int, int], ...]:
        """Cursors below `next_cursor` that have no settled group before `step`, each with its next attempt.

        In the order in which a resumed run should lease them.
        """
        waiting: dict[int, int] = {}
        for entry in sorted(self._open.values(), key=lambda item: item.order):
            if entry.step is None or entry.step >= step:
                waiting[entry.cursor] = max(waiting.get(entry.cursor, 0), entry.next_attempt)
        for cursor, attempt in self._pending:
            waiting[cursor] = max(waiting.get(cursor, 0), attempt)
        return tuple(waiting.items())

    def _move(self, entry: Entry, state: State) -> None:
        if state not in EDGES.get(entry.state, frozenset()) or self._open.get(entry.group_id) is not entry:
            raise AssertionError(f"group {entry.group_id} cannot go from {entry.state} to {state}")
        self._on_transition(entry, state)
        self._by_state[entry.state] -= 1
        entry.state = state
        self._by_state[state] += 1

    def _forget(self, entry: Entry) -> None:
        self._by_state[entry.state] -= 1
        del self._open[entry.group_id]
        attempts = self._attempts[entry.cursor]
        del attempts[entry.group_id]
        if not attempts:
            del self._attempts[entry.cursor]
