"""Folds a journal into a history of the run, record by record, and checks each against those before."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from echelon.audit.group_facts import BatchFacts, batch_facts, read_facts
from echelon.audit.ledger import AuditedGroup, AuditedLedger
from echelon.audit.saved_state import SavedStates
from echelon.audit.violation import Findings


@dataclass(frozen=True)
class CutBatch:
    """facts: None where the batch broke a rule so badly that nothing can be reckoned of it."""

    group_ids: tuple[str, ...]
    facts: BatchFacts | None


@dataclass(frozen=True)
class TakenStep:
    """metrics: as the learner reported them. row: what else metrics.jsonl must say of the step."""

    metrics: dict[str, float]
    row: dict[str, float]
    facts: BatchFacts | None


class History:
    """What the records so far say. steps: those that were taken, by number. ended: the broker closed its journal."""

    def __init__(self, findings: Findings, terms: BrokerStarted) -> None:
        """Args: terms: of the run; they hold until a record states others, as where early segments are gone."""
        self.terms = terms
        self.findings = findings
        self.ledger = AuditedLedger(findings)
        self.saved = SavedStates(findings, self.ledger)
        self.batches: dict[int, CutBatch] = {}
        self.steps: dict[int, TakenStep] = {}
        self.next_step: int | None = 0
        self.ended: BrokerEnded | None = None
        self.num_records = 0

    def take(self, entry: JournalEntry) -> None:
        """One record more."""
        self.findings.place = entry.place
        record = entry.record
        if self.ended is not None and not isinstance(record, BrokerStarted):
            self.findings.add("terms", f"{type(record).__name__} after the broker had closed its journal")
        if not self.num_records and not isinstance(record, BrokerStarted | StateSaved):
            self.findings.add("terms", f"the journal begins with {type(record).__name__}")
        if not (isinstance(record, GroupCompleted) and record.copied):
            self.saved.end_of_copies()
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
                self._cut(record)
            case StepTaken():
                self._taken(record)
            case BrokerEnded():
                self.ended = record
        self.num_records += 1
        self.findings.place = None

    def _started(self, record: BrokerStarted) -> None:
        if record.run_id != self.terms.run_id:
            self.findings.add("terms", f"written by run {record.run_id}, this is {self.terms.run_id}")
        self.terms, self.ended = record, None

    def _state_saved(self, record: StateSaved, segment: int) -> None:
        is_first = not self.ledger.groups and not self.steps
        self.saved.take(record, segment, is_first)
        if is_first:
            self.next_step = None

    # ------------------------------------------------------------ groups

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

    # ------------------------------------------------------------ steps

    def _cut(self, record: BatchCut) -> None:
        known = self.batches.get(record.step)
        if known is not None:
            if known.group_ids != record.group_ids:
                what = "the batch was cut before, and then of other groups"
                self.findings.add("trained_twice", what, step=record.step)
            return
        if self.next_step is not None and record.step != self.next_step:
            self.findings.add("step", f"batch cut, the next step is {self.next_step}", step=record.step)
        self.next_step = record.step
        if len(record.group_ids) != self.terms.batch_groups:
            what = f"a batch of {len(record.group_ids)} groups, {self.terms.batch_groups} make one"
            self.findings.add("batch", what, step=record.step)
        groups = [group for group_id in record.group_ids if (group := self._claim(group_id, record.step)) is not None]
        self._check_lags(groups, record.step)
        self._check_passed_over(groups, record.step)
        self.batches[record.step] = CutBatch(record.group_ids, self._facts_of(groups, record.step))

    def _claim(self, group_id: str, step: int) -> AuditedGroup | None:
        """The group, which is this batch's from now on."""
        group = self.ledger.groups.get(group_id)
        if group is not None and group.step is not None:
            what = f"in this batch, and in that of step {group.step}"
            self.findings.add("trained_twice", what, group_id=group_id, step=step)
        elif group is None or group.facts is None or group.state != "completed":
            state = "never leased" if group is None else group.state
            self.findings.add("batch", f"in this batch, but {state}", group_id=group_id, step=step)
        else:
            group.step = step
            return group
        return None

    def _facts_of(self, groups: Sequence[AuditedGroup], step: int) -> BatchFacts | None:
        facts = [group.facts for group in groups if group.facts is not None]
        if not any(each.is_fresh(step, self.terms.max_staleness, self._masks) for each in facts):
            return None
        return batch_facts(facts, step, self.terms.max_staleness, self._masks)

    @property
    def _masks(self) -> bool:
        return self.terms.stale_policy == "mask"

    def _check_lags(self, groups: Sequence[AuditedGroup], step: int) -> None:
        for group in groups:
            assert group.facts is not None
            versions = group.facts.versions
            if not group.facts.is_fresh(step, self.terms.max_staleness, self._masks):
                lags = f"lags {step - versions[-1]} to {step - versions[0]}" if len(versions) else "no loss"
                what = f"its tokens have {lags}, allowed are 0 to {self.terms.max_staleness}"
                self.findings.add("staleness", what, group_id=group.group_id, step=step)
            if len(versions) and versions[-1] > step:
                what = f"a token of version {versions[-1]}, which came after"
                self.findings.add("staleness", what, group_id=group.group_id, step=step)

    def _check_passed_over(self, chosen: Sequence[AuditedGroup], step: int) -> None:
        """The oldest groups come first, and none stays that can never be trained: what waits has its turn."""
        newest = max((group.facts.oldest_version for group in chosen if group.facts is not None), default=-1)
        for group in self.ledger.waiting.values():
            if group.step is not None or group.facts is None:
                continue
            if not group.facts.is_fresh(step, self.terms.max_staleness, self._masks):
                what = "it waits, too old for this step and all later ones, and was not settled as stale"
                self.findings.add("lost", what, group_id=group.group_id, step=step)
            elif group.facts.oldest_version < newest:
                what = f"passed over: its oldest token is of version {group.facts.oldest_version}, others' of {newest}"
                self.findings.add("lost", what, group_id=group.group_id, step=step)

    def _taken(self, record: StepTaken) -> None:
        batch = self.batches.get(record.step)
        if record.step in self.steps:
            self.findings.add("trained_twice", "taken a second time", step=record.step)
            return
        if batch is None:
            self.findings.add("step", "taken, but its batch was never cut", step=record.step)
            return
        for group_id in batch.group_ids:
            group = self.ledger.groups.get(group_id)
            if group is not None and group.step == record.step and group.state == "completed":
                self.ledger.train(group)
        self._check_reported(record, batch.facts)
        counts = {f"ledger/{state}_groups": float(count) for state, count in self.ledger.settled_counts().items()}
        row = counts | {"bus/queued_groups": float(len(self.ledger.waiting))}
        self.steps[record.step] = TakenStep(
            record.metrics, row | (batch.facts.row if batch.facts is not None else {}), batch.facts
        )
        self.next_step = record.step + 1

    def _check_reported(self, record: StepTaken, facts: BatchFacts | None) -> None:
        """Did the learner read as many tokens as the batch has?"""
        reported = record.metrics.get("learner/num_tokens")
        if facts is not None and reported is not None and reported != facts.inputs:
            what = f"the learner read {reported:.0f} tokens, the batch has {facts.inputs}"
            self.findings.add("metrics", what, step=record.step)

    def finish(self) -> None:
        """No record is left."""
        self.saved.end_of_copies()
