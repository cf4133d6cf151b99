"""Folds a journal into a history of the run, record by record, and checks each against those before."""

from collections.abc import Sequence

from databus.codec import Frame, MalformedMessage
from databus.journal import JournalEntry
from databus.records import (
    BatchCut,
    BrokerEnded,
    BrokerStarted,
    GroupCompleted,
    GroupLeased,
    GroupMoved,
    StateSaved,
    StepTaken,
)
from echelon.audit.batches import AuditedBatches
from echelon.audit.group_facts import read_facts
from echelon.audit.ledger import AuditedLedger
from echelon.audit.saved_state import SavedStates
from echelon.audit.violation import Findings


class History:
    """What the records so far say.

    first_step: where the journal begins; earlier steps are gone with their segments. ended: the broker closed it.
    """

    def __init__(self, findings: Findings, terms: BrokerStarted) -> None:
        """Args: terms: of the run; they hold until a record states others, as where early segments are gone."""
        self.terms = terms
        self.findings = findings
        self.ledger = AuditedLedger(findings)
        self.batches = AuditedBatches(findings, self.ledger)
        self.saved = SavedStates(findings, self.ledger)
        self.first_step = 0
        self.ended: BrokerEnded | None = None
        self.num_records = 0

    def take(self, entry: JournalEntry) -> None:
        """One record more."""
        self.findings.place = entry.place
        record = entry.record
        self._check_sequence(entry)
        match record:
            case BrokerStarted():
                self._started(record)
            case StateSaved():
                self._state_saved(record, entry.place.segment)
            case GroupLeased():
                self.ledger.lease(record, self.terms.run_id)
            case GroupCompleted():
                self._completed(record, entry.frames)
            case GroupMoved():
                self.ledger.move(record)
            case BatchCut():
                self.batches.cut(record, self.terms)
            case StepTaken():
                self.batches.take(record)
            case BrokerEnded():
                self.ended = record
        self.num_records += 1
        self.findings.place = None

    def finish(self) -> None:
        """No record is left."""
        self.saved.end_of_copies()

    def _check_sequence(self, entry: JournalEntry) -> None:
        record = entry.record
        if self.ended is not None and not isinstance(record, BrokerStarted):
            self.findings.add("terms", f"{type(record).__name__} after the broker had closed its journal")
        if not self.num_records and not isinstance(record, BrokerStarted | StateSaved):
            self.findings.add("terms", f"the journal begins with {type(record).__name__}")
        if not (isinstance(record, GroupCompleted) and record.copied):
            self.saved.end_of_copies()

    def _started(self, record: BrokerStarted) -> None:
        if record.run_id != self.terms.run_id:
            self.findings.add("terms", f"written by run {record.run_id}, this is {self.terms.run_id}")
        self.terms, self.ended = record, None

    def _state_saved(self, record: StateSaved, segment: int) -> None:
        is_first = not self.ledger.groups and not self.batches.taken
        self.saved.take(record, segment, is_first)
        if is_first:
            self.first_step, self.batches.next_step = record.step, None

    def num_steps(self) -> int:
        """How many steps the run has taken."""
        return max(self.batches.taken, default=self.first_step - 1) + 1

    def _completed(self, record: GroupCompleted, frames: Sequence[Frame]) -> None:
        try:
            facts = read_facts(record, frames)
        except MalformedMessage as error:
            self.findings.add("content", str(error), group_id=record.group_id)
            return
        if record.copied:
            self.saved.copy(record.group_id, facts)
            return
        if len(facts.lengths) != self.terms.group_size:
            what = f"{len(facts.lengths)} completions, {self.terms.group_size} were leased"
            self.findings.add("batch", what, group_id=record.group_id)
        if facts.lengths.max() > self.terms.max_tokens:
            what = f"a completion of {facts.lengths.max()} tokens, at most {self.terms.max_tokens} were leased"
            self.findings.add("content", what, group_id=record.group_id)
        self.ledger.complete(record.group_id, facts)
