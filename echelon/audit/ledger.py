"""The ledger's rules once more, as the auditor reads them: which group may go where, and which cursor may be leased."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import xxhash

from databus.records import GroupLeased, GroupMoved, OpenGroup
from echelon.audit.group_facts import GroupFacts
from echelon.audit.violation import Findings

GroupState = Literal["leased", "expired", "superseded", "completed", "trained", "stale", "filtered", "failed"]

ALLOWED: frozenset[tuple[GroupState, GroupState]] = frozenset(
    {
        ("leased", "completed"),
        ("leased", "expired"),
        ("leased", "failed"),
        ("expired", "completed"),
        ("completed", "trained"),
        ("completed", "stale"),
        ("completed", "filtered"),
        ("completed", "failed"),
        ("superseded", "expired"),
    }
)
SETTLED: tuple[GroupState, ...] = ("trained", "stale", "filtered", "failed")


@dataclass
class AuditedGroup:
    """state `superseded`: it was leased when another attempt of its cursor was completed. step: whose batch has it."""

    group_id: str
    cursor: int
    attempt: int
    state: GroupState
    facts: GroupFacts | None = None
    step: int | None = None


@dataclass
class Cursor:
    """A cursor that no settled group has used up.

    next_attempt: of its next lease. closed_below: attempts below may not be completed any more. may_lease: it waits.
    """

    next_attempt: int = 0
    closed_below: int = 0
    may_lease: bool = True
    attempts: list[AuditedGroup] = field(default_factory=list)


class AuditedLedger:
    """Every group and where it stands; what may not be is a violation, and is then taken as it was written."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.groups: dict[str, AuditedGroup] = {}
        self.cursors: dict[int, Cursor] = {}
        self.counts: Counter[str] = Counter()
        self.next_cursor = 0
        self.num_leases = 0
        self.waiting: dict[str, AuditedGroup] = {}
        """Completed groups: those that wait for a batch, and those of the batch under way."""

    def load(
        self,
        open_groups: Iterable[OpenGroup],
        pending: Sequence[tuple[int, int]],
        counts: dict[str, int],
        next_cursor: int,
        num_leases: int,
    ) -> None:
        """Begin in the middle of a run."""
        self.next_cursor, self.num_leases = next_cursor, num_leases
        self.counts = Counter(counts)
        self.cursors = {cursor: Cursor(next_attempt=attempt) for cursor, attempt in pending}
        for item in open_groups:
            group = AuditedGroup(item.group_id, item.cursor, item.attempt, item.state)
            cursor = self.cursors.setdefault(item.cursor, Cursor(next_attempt=item.next_attempt))
            self._add(group, cursor)
            if item.state == "completed":
                self._accept(group, cursor)
            elif item.state == "leased":
                cursor.may_lease = False

    def _add(self, group: AuditedGroup, cursor: Cursor) -> None:
        self.groups[group.group_id] = group
        cursor.attempts.append(group)

    def lease(self, record: GroupLeased, run_id: str) -> None:
        add = self._findings.add
        expected_id = xxhash.xxh3_128_hexdigest(f"{run_id}/{record.cursor}/{record.attempt}".encode())
        if record.group_id != expected_id:
            what = f"its id is not the hash of run {run_id}, cursor {record.cursor}, attempt {record.attempt}"
            add("group_id", what, group_id=record.group_id)
        if record.group_id in self.groups:
            add("edge", f"leased again: it is {self.groups[record.group_id].state}", group_id=record.group_id)
        if record.cursor > self.next_cursor:
            what = f"cursor {record.cursor} leased, the next one is {self.next_cursor}"
            add("edge", what, group_id=record.group_id)
        if record.cursor >= self.next_cursor:
            self.next_cursor = record.cursor + 1
            self.cursors[record.cursor] = Cursor()
        cursor = self.cursors.setdefault(record.cursor, Cursor(record.attempt, may_lease=False))
        if not cursor.may_lease or record.attempt != cursor.next_attempt:
            waits = f"waits for attempt {cursor.next_attempt}" if cursor.may_lease else "does not wait for a lease"
            what = f"attempt {record.attempt} of cursor {record.cursor} leased, which {waits}"
            add("edge", what, group_id=record.group_id)
        cursor.next_attempt, cursor.may_lease = record.attempt + 1, False
        self._add(AuditedGroup(record.group_id, record.cursor, record.attempt, "leased"), cursor)
        self.num_leases += 1

    def complete(self, group_id: str, facts: GroupFacts) -> None:
        group = self._move(group_id, "completed")
        if group is None:
            return
        group.facts = facts
        cursor = self.cursors.setdefault(group.cursor, Cursor(group.attempt + 1))
        if group.attempt < cursor.closed_below:
            what = f"completed, but another attempt of cursor {group.cursor} had been completed before"
            self._findings.add("edge", what, group_id=group_id)
        self._accept(group, cursor)

    def _accept(self, group: AuditedGroup, cursor: Cursor) -> None:
        """The cursor has its result: other attempts are not wanted any more."""
        self.waiting[group.group_id] = group
        self._close(group, cursor)

    def _close(self, group: AuditedGroup, cursor: Cursor) -> None:
        cursor.closed_below, cursor.may_lease = cursor.next_attempt, False
        for other in cursor.attempts:
            if other is not group and other.state == "leased":
                other.state = "superseded"
                self.counts["expired"] += 1
        cursor.attempts = [group]

    def move(self, record: GroupMoved) -> None:
        was_superseded = record.group_id in self.groups and self.groups[record.group_id].state == "superseded"
        group = self._move(record.group_id, record.state)
        if group is None or was_superseded:
            return
        if group.step is not None:
            what = f"{record.state}, but it is in the batch of step {group.step}"
            self._findings.add("edge", what, group_id=group.group_id, step=group.step)
        if record.state == "expired":
            self.counts["expired"] += 1
            self.cursors[group.cursor].may_lease = True
        else:
            self._settle(group, requeued=record.requeued)

    def train(self, group: AuditedGroup) -> None:
        if self._move(group.group_id, "trained") is not None:
            self._settle(group, requeued=False)

    def _settle(self, group: AuditedGroup, requeued: bool) -> None:
        self.counts[group.state] += 1
        self.waiting.pop(group.group_id, None)
        group.facts = None
        cursor = self.cursors.get(group.cursor)
        if cursor is None:
            return
        self._close(group, cursor)
        cursor.may_lease = requeued
        if not requeued:
            del self.cursors[group.cursor]

    def _move(self, group_id: str, state: GroupState) -> AuditedGroup | None:
        group = self.groups.get(group_id)
        if group is None:
            self._findings.add("edge", f"{state}, but it was never leased", group_id=group_id)
            return None
        if (group.state, state) not in ALLOWED:
            what = f"went from {group.state} to {state}" + (f" (step {group.step})" if group.step is not None else "")
            self._findings.add("edge", what, group_id=group_id)
            return None
        group.state = state
        return group

    def pending(self) -> set[tuple[int, int]]:
        """(cursor, next attempt) of all cursors below `next_cursor` that no settled group has used up."""
        return {(number, cursor.next_attempt) for number, cursor in self.cursors.items()}

    def settled_counts(self) -> dict[str, int]:
        return {state: self.counts[state] for state in (*SETTLED, "expired")}

    def count_open(self, state: GroupState) -> int:
        return sum(group.state == state for cursor in self.cursors.values() for group in cursor.attempts)
