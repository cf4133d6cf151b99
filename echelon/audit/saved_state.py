"""The states that a broker saved: do they say what the records before them say, and are their copies true?"""

from typing import Any

from databus.records import StateSaved
from echelon.audit.group_facts import GroupFacts
from echelon.audit.ledger import AuditedLedger
from echelon.audit.violation import Findings


class SavedStates:
    """by_segment: every state that was saved, by the segment that it begins."""

    def __init__(self, findings: Findings, ledger: AuditedLedger) -> None:
        self._findings = findings
        self._ledger = ledger
        self._step = 0
        self._uncopied: set[str] = set()
        self.by_segment: dict[int, StateSaved] = {}

    def take(self, record: StateSaved, segment: int, is_first: bool) -> None:
        """Args: is_first: the records before are gone, so that it has to be taken for the truth."""
        ledger = self._ledger
        if is_first:
            ledger.load(record.groups, record.pending, record.counts, record.next_cursor, record.num_leases)
        else:
            self._compare(record)
        self.by_segment[segment] = record
        self._step = record.step
        self._uncopied = set(ledger.waiting)
        if record.num_copies != len(self._uncopied):
            what = f"{record.num_copies} copies announced, {len(self._uncopied)} completed groups wait"
            self._findings.add("state", what, step=record.step)

    def _compare(self, record: StateSaved) -> None:
        ledger, counts = self._ledger, self._ledger.settled_counts()
        self._expect("next_cursor", record.next_cursor, ledger.next_cursor)
        self._expect("num_leases", record.num_leases, ledger.num_leases)
        self._expect("pending", sorted(record.pending), sorted(ledger.pending()))
        self._expect("counts", {state: record.counts.get(state, 0) for state in counts}, counts)
        saved = {group.group_id: group.state for group in record.groups}
        for group_id in ledger.waiting.keys() - saved.keys():
            what = "it was completed, and is not in the state that was saved"
            self._findings.add("lost", what, group_id=group_id, step=record.step)
        for group_id, state in saved.items():
            known = ledger.groups[group_id].state if group_id in ledger.groups else "never leased"
            if known != state:
                what = f"saved as {state}, the records say {known}"
                self._findings.add("state", what, group_id=group_id, step=record.step)

    def _expect(self, name: str, saved: Any, known: Any) -> None:
        if saved != known:
            self._findings.add("state", f"{name} was saved as {saved}, the records say {known}")

    def copy(self, group_id: str, facts: GroupFacts) -> None:
        """A completed group once more, behind a state that was saved."""
        group = self._ledger.waiting.get(group_id)
        if group is None or group_id not in self._uncopied:
            self._findings.add("copy", "copied, but it does not wait, or was copied before", group_id=group_id)
            return
        self._uncopied.remove(group_id)
        if group.facts is None:
            group.facts = facts
        elif group.facts.digest != facts.digest:
            self._findings.add("copy", "its copy differs from the original", group_id=group_id)

    def end_of_copies(self) -> None:
        """The copies behind the last state are over: is there one of each?"""
        for group_id in sorted(self._uncopied):
            what = f"it was completed, and is not among the copies for step {self._step}"
            self._findings.add("lost", what, group_id=group_id)
        self._uncopied = set()
