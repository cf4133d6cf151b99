"""What a report takes from a journal: who worked when, and what became of each group."""

import gc
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from databus.codec import Array, Frame, MalformedMessage, decode_columns
from databus.journal import JournalDamaged, JournalEntry, read_journal, segments
from databus.records import (
    BatchCut,
    BrokerStarted,
    GroupCompleted,
    GroupLeased,
    GroupMoved,
    StateSaved,
    StepTaken,
)
from echelon.report.spans import Spans, merged

COLUMNS = frozenset({"lengths", "rewards"})
FATES = ("trained", "stale", "filtered", "failed", "open")


@dataclass
class WorkerSpans:
    """Leases of a worker: when each began and ended, and how many tokens came of them."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    tokens: int = 0

    def busy(self) -> Spans:
        return merged(np.array(self.starts), np.array(self.ends))


@dataclass(slots=True)
class GroupOutcome:
    """predicted: tokens of a completion, 0 where not known. length, reward: means over its completions."""

    worker: str
    predicted: int
    length: float
    reward: float
    fate: str = "open"


@dataclass(frozen=True)
class JournalFacts:
    """first_step: where the journal begins; earlier segments are gone. start, end: seconds since the epoch, equal where
    records bear no times. outcomes: of completed groups. notes: what could not be read.
    """

    first_step: int
    start: float
    end: float
    broker: Spans
    learner: Spans
    workers: dict[str, WorkerSpans]
    outcomes: tuple[GroupOutcome, ...]
    notes: tuple[str, ...]

    @property
    def has_times(self) -> bool:
        return self.end > self.start


def read_journal_facts(folder: Path) -> JournalFacts | None:
    """None where there is no journal. What is damaged or vanishes meanwhile is a note, not an error."""
    if not segments(folder):
        return None
    fold = _Fold()
    was_enabled = gc.isenabled()
    gc.disable()  # hundreds of thousands of small objects, none in a cycle: looking for some takes a third of the time
    try:
        fold.take_all(read_journal(folder))
    except JournalDamaged as error:
        fold.notes.append(f"the journal cannot be read to its end: {error}")
    except FileNotFoundError as error:
        fold.notes.append(f"a segment of the journal was deleted while it was read: {error.filename}")
    finally:
        if was_enabled:
            gc.enable()
    return fold.facts()


class _Fold:
    """Keeps open leases by group, and what is to be told of the closed ones."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._first_step = 0
        self._has_begun = False
        self._leases: dict[str, GroupLeased] = {}
        self._outcomes: dict[str, GroupOutcome] = {}
        self._settled: list[GroupOutcome] = []
        self._workers: defaultdict[str, WorkerSpans] = defaultdict(WorkerSpans)
        self._batches: dict[int, tuple[float, tuple[str, ...]]] = {}
        self._steps: list[tuple[float, float]] = []
        self._brokers: list[tuple[float, float]] = []
        self._now = 0.0

    def take_all(self, entries: Iterable[JournalEntry]) -> None:
        for _, record, frames in entries:
            self._now = getattr(record, "time_s", 0.0) or self._now
            match record:
                case GroupLeased():
                    self._leases[record.group_id] = record
                case GroupCompleted():
                    self._completed(record, frames)
                case GroupMoved():
                    self._moved(record)
                case BatchCut():
                    self._batches[record.step] = (record.time_s, record.group_ids)
                case StepTaken():
                    self._stepped(record)
                case BrokerStarted():
                    self._brokers.append((record.time_s, record.time_s))
                case StateSaved() if not self._has_begun:
                    self._first_step = record.step
            self._has_begun = True
            if self._brokers and not isinstance(record, BrokerStarted):
                self._brokers[-1] = (self._brokers[-1][0], self._now)

    def _completed(self, record: GroupCompleted, frames: tuple[Frame, ...]) -> None:
        lease = self._leases.pop(record.group_id, None)
        if record.copied and record.group_id in self._outcomes:
            return
        try:
            arrays = decode_columns(record.columns, frames, only=COLUMNS)
            lengths, rewards = arrays["lengths"].tolist(), arrays["rewards"].tolist()
        except (MalformedMessage, KeyError) as error:
            self.notes.append(f"group {record.group_id} of the journal cannot be read: {error}")
            return
        worker = record.worker or (lease.worker if lease is not None else "")
        num_tokens = sum(lengths)
        outcome = GroupOutcome(
            worker,
            0 if lease is None else lease.predicted_tokens,
            num_tokens / len(lengths),
            sum(rewards) / len(rewards),
        )
        self._outcomes[record.group_id] = outcome
        if lease is not None:
            self._close(lease, record.time_s)
            self._workers[lease.worker].tokens += num_tokens

    def _moved(self, record: GroupMoved) -> None:
        lease = self._leases.pop(record.group_id, None)
        if lease is not None:
            self._close(lease, record.time_s)
        if record.state != "expired":
            self._settle(record.group_id, record.state)

    def _close(self, lease: GroupLeased, end: float) -> None:
        if lease.time_s > 0:
            worker = self._workers[lease.worker]
            worker.starts.append(lease.time_s)
            worker.ends.append(end)

    def _settle(self, group_id: str, fate: str) -> None:
        outcome = self._outcomes.pop(group_id, None)
        if outcome is not None:
            outcome.fate = fate
            self._settled.append(outcome)

    def _stepped(self, record: StepTaken) -> None:
        cut, group_ids = self._batches.pop(record.step, (0.0, ()))
        for group_id in group_ids:
            self._settle(group_id, "trained")
        if cut > 0 and record.time_s > 0:
            self._steps.append((cut, record.time_s))

    def facts(self) -> JournalFacts:
        for lease in self._leases.values():  # still generated, or lost with everything else
            self._close(lease, self._now)
        for cut, _ in self._batches.values():
            if cut > 0:
                self._steps.append((cut, self._now))
        brokers = _spans(self._brokers)
        begins = [worker.starts[0] for worker in self._workers.values() if worker.starts]
        begins += brokers.starts.tolist()
        return JournalFacts(
            first_step=self._first_step,
            start=min(begins, default=self._now),
            end=self._now,
            broker=brokers,
            learner=_spans(self._steps),
            workers=dict(sorted(self._workers.items(), key=lambda item: natural(item[0]))),
            outcomes=(*self._settled, *self._outcomes.values()),
            notes=tuple(self.notes),
        )


def _spans(pairs: list[tuple[float, float]]) -> Spans:
    array: Array = np.array([pair for pair in pairs if pair[0] > 0], np.float64).reshape(-1, 2)
    return merged(array[:, 0], array[:, 1])


def natural(name: str) -> tuple[str, int]:
    """worker-2 before worker-10."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)
