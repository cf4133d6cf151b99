"""Batches as the auditor reads them: whose groups, of which age, taken when."""

from collections.abc import Sequence
from dataclasses import dataclass

from databus.records import BatchCut, BrokerStarted, StepTaken
from echelon.audit.group_facts import BatchFacts, batch_facts
from echelon.audit.ledger import AuditedGroup, AuditedLedger
from echelon.audit.violation import Findings


@dataclass(frozen=True)
class AuditedBatch:
    """facts: None where the batch broke a rule so badly that nothing can be reckoned of it."""

    group_ids: tuple[str, ...]
    facts: BatchFacts | None


@dataclass(frozen=True)
class TakenStep:
    """metrics: as the learner reported them. row: what else metrics.jsonl must say of the step."""

    metrics: dict[str, float]
    row: dict[str, float]
    facts: BatchFacts | None


class AuditedBatches:
    """next_step: None where the journal begins in the middle of a run. taken: by step."""

    def __init__(self, findings: Findings, ledger: AuditedLedger) -> None:
        self._findings = findings
        self._ledger = ledger
        self._batches: dict[int, AuditedBatch] = {}
        self.taken: dict[int, TakenStep] = {}
        self.next_step: int | None = 0

    def cut(self, record: BatchCut, terms: BrokerStarted) -> None:
        known = self._batches.get(record.step)
        if known is not None:
            if known.group_ids != record.group_ids:
                what = "the batch was cut before, and then of other groups"
                self._findings.add("trained_twice", what, step=record.step)
            return
        if self.next_step not in (None, record.step):
            self._findings.add("step", f"batch cut, the next step is {self.next_step}", step=record.step)
        self.next_step = record.step
        if len(record.group_ids) != terms.batch_groups:
            what = f"a batch of {len(record.group_ids)} groups, {terms.batch_groups} make one"
            self._findings.add("batch", what, step=record.step)
        groups = [group for group_id in record.group_ids if (group := self._claim(group_id, record.step)) is not None]
        self._check_lags(groups, record.step, terms)
        self._check_passed_over(groups, record.step, terms)
        self._batches[record.step] = AuditedBatch(record.group_ids, _facts_of(groups, record.step, terms))

    def _claim(self, group_id: str, step: int) -> AuditedGroup | None:
        """The group, which is this batch's from now on."""
        group = self._ledger.groups.get(group_id)
        if group is not None and group.step is not None:
            what = f"in this batch, and in that of step {group.step}"
            self._findings.add("trained_twice", what, group_id=group_id, step=step)
        elif group is None or group.facts is None or group.state != "completed":
            state = "never leased" if group is None else group.state
            self._findings.add("batch", f"in this batch, but {state}", group_id=group_id, step=step)
        else:
            group.step = step
            return group
        return None

    def _check_lags(self, groups: Sequence[AuditedGroup], step: int, terms: BrokerStarted) -> None:
        for group in groups:
            assert group.facts is not None
            versions = group.facts.versions
            if not _is_fresh(group, step, terms):
                lags = f"lags {step - versions[-1]} to {step - versions[0]}" if len(versions) else "no loss"
                what = f"its tokens have {lags}, allowed are 0 to {terms.max_staleness}"
                self._findings.add("staleness", what, group_id=group.group_id, step=step)
            if len(versions) and versions[-1] > step:
                what = f"a token of version {versions[-1]}, which came after"
                self._findings.add("staleness", what, group_id=group.group_id, step=step)

    def _check_passed_over(self, chosen: Sequence[AuditedGroup], step: int, terms: BrokerStarted) -> None:
        """The oldest groups come first, and none stays that can never be trained: what waits has its turn."""
        newest = max((group.facts.oldest_version for group in chosen if group.facts is not None), default=-1)
        for group in self._ledger.waiting.values():
            if group.step is not None or group.facts is None:
                continue
            oldest = group.facts.oldest_version
            if not _is_fresh(group, step, terms):
                what = "it waits, too old for this step and all later ones, and was not settled as stale"
                self._findings.add("lost", what, group_id=group.group_id, step=step)
            elif oldest < newest:
                what = f"passed over: its oldest token is of version {oldest}, another group's of {newest}"
                self._findings.add("lost", what, group_id=group.group_id, step=step)

    def take(self, record: StepTaken) -> None:
        batch = self._batches.get(record.step)
        if record.step in self.taken:
            self._findings.add("trained_twice", "taken a second time", step=record.step)
            return
        if batch is None:
            self._findings.add("step", "taken, but its batch was never cut", step=record.step)
            return
        for group_id in batch.group_ids:
            group = self._ledger.groups.get(group_id)
            if group is not None and group.step == record.step and group.state == "completed":
                self._ledger.train(group)
        self._check_reported(record, batch.facts)
        self.taken[record.step] = TakenStep(record.metrics, self._row(batch), batch.facts)
        self.next_step = record.step + 1

    def _row(self, batch: AuditedBatch) -> dict[str, float]:
        counts = {f"ledger/{state}_groups": float(count) for state, count in self._ledger.settled_counts().items()}
        queued = {"bus/queued_groups": float(len(self._ledger.waiting))}
        return counts | queued | ({} if batch.facts is None else batch.facts.row)

    def _check_reported(self, record: StepTaken, facts: BatchFacts | None) -> None:
        """Did the learner read as many tokens as the batch has?"""
        reported = record.metrics.get("learner/num_tokens")
        if facts is not None and reported is not None and reported != facts.inputs:
            what = f"the learner read {reported:.0f} tokens, the batch has {facts.inputs}"
            self._findings.add("metrics", what, step=record.step)


def _is_fresh(group: AuditedGroup, step: int, terms: BrokerStarted) -> bool:
    assert group.facts is not None
    return group.facts.is_fresh(step, terms.max_staleness, terms.stale_policy == "mask")


def _facts_of(groups: Sequence[AuditedGroup], step: int, terms: BrokerStarted) -> BatchFacts | None:
    if not any(_is_fresh(group, step, terms) for group in groups):
        return None
    facts = [group.facts for group in groups if group.facts is not None]
    return batch_facts(facts, step, terms.max_staleness, terms.stale_policy == "mask")
