"""What a run has left behind of how long everything took: its journal's leases and steps, and its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from databus.codec import Frame, MalformedMessage, decode_columns
from databus.journal import JournalDamaged, JournalEntry, read_journal, segments
from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, StepTaken
from echelon.files import read_rows
from echelon.metrics import TRAINED
from echelon.plan.workload import RecordedGroup
from echelon.run_folder import RunFolder

MIN_STEPS = 3
"""The first is slower than any other, and of two nobody could say which is the odd one."""

COLUMNS = frozenset({"prompt_ids", "lengths", "rewards"})


@dataclass(frozen=True)
class LeasedGroup:
    """start, end: of the lease, seconds since the epoch. predicted: tokens of a completion.

    score_s: of scoring; 0 where an earlier version wrote the journal.
    """

    worker: str
    start: float
    end: float
    predicted: int
    prompt: tuple[int, ...]
    group: RecordedGroup
    score_s: float = 0.0


@dataclass(frozen=True)
class LearnerStep:
    """cut, taken: of the batch, seconds since the epoch. tokens: of its completions."""

    step: int
    cut: float
    taken: float
    tokens: int


@dataclass
class Trace:
    """groups: completed ones, by the end of their lease. lost: (worker, start, end) of leases that came to nothing."""

    groups: list[LeasedGroup] = field(default_factory=list)
    lost: list[tuple[str, float, float]] = field(default_factory=list)
    steps: list[LearnerStep] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def read_trace(folder: RunFolder) -> Trace:
    """Raises: ValueError, in one line, where there is no run, or too little of it."""
    if not folder.path.is_dir():
        raise ValueError(f"no such run folder: {folder.path}")
    folder.record()
    rows = [row for row in read_rows(folder.metrics_file) if TRAINED in row]
    if len(rows) < MIN_STEPS:
        raise ValueError(f"{folder.path} has {len(rows)} steps in metrics.jsonl: a plan needs at least {MIN_STEPS}")
    trace = _read_journal(folder.journal)
    if not trace.groups or not trace.steps:
        raise ValueError(
            f"{folder.path} has no journal of a whole step with times: a plan needs one (journal.keep=true keeps all)"
        )
    trace.rows = rows
    return trace


def _read_journal(folder: Path) -> Trace:
    if not segments(folder):
        return Trace()
    try:
        return _fold(read_journal(folder))
    except (JournalDamaged, MalformedMessage, KeyError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from None


def _fold(entries: Iterable[JournalEntry]) -> Trace:
    fold = _Fold()
    for _, record, frames in entries:
        match record:
            case GroupLeased(time_s=time_s) if time_s > 0:
                fold.leases[record.group_id] = record
            case GroupCompleted():
                fold.completed(record, frames)
            case GroupMoved() if record.group_id in fold.leases:
                fold.moved[record.group_id] = record.time_s
            case BatchCut():
                fold.cuts[record.step] = record
            case StepTaken() if record.step in fold.cuts:
                fold.stepped(record, fold.cuts.pop(record.step))
    return fold.trace()


class _Fold:
    """leases: of groups that have not come in. moved: when one of them was given up; it may come in all the same."""

    def __init__(self) -> None:
        self.leases: dict[str, GroupLeased] = {}
        self.moved: dict[str, float] = {}
        self.cuts: dict[int, BatchCut] = {}
        self._tokens: dict[str, int] = {}
        self._trace = Trace()

    def completed(self, record: GroupCompleted, frames: Sequence[Frame]) -> None:
        arrays = decode_columns(record.columns, frames, only=COLUMNS)
        prompt, lengths, rewards = (arrays[name].copy() for name in ("prompt_ids", "lengths", "rewards"))
        self._tokens[record.group_id] = int(lengths.sum())
        lease = self.leases.pop(record.group_id, None)
        if lease is not None:
            group = RecordedGroup(len(prompt), lengths, rewards)
            predicted, prompt_ids = lease.predicted_tokens, tuple(prompt.tolist())
            self._trace.groups.append(
                LeasedGroup(lease.worker, lease.time_s, record.time_s, predicted, prompt_ids, group, record.score_s)
            )

    def stepped(self, record: StepTaken, cut: BatchCut) -> None:
        trained = sum(self._tokens.pop(group_id, 0) for group_id in cut.group_ids)
        if cut.time_s > 0:
            self._trace.steps.append(LearnerStep(record.step, cut.time_s, record.time_s, trained))

    def trace(self) -> Trace:
        lost = [(lease.worker, lease.time_s, self.moved.get(group_id)) for group_id, lease in self.leases.items()]
        self._trace.lost += [(worker, start, end) for worker, start, end in lost if end is not None]
        return self._trace
