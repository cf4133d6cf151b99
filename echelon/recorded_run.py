"""A run's batches as its journal has them, and the steps that were taken on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from databus.codec import Frame
from databus.config import StalePolicy
from databus.groups import Group, decode_group, encode_group
from databus.journal import Place, read_journal, read_record
from databus.messages import Batch, BatchGroup, BatchRequest
from databus.records import BatchCut, BrokerStarted, GroupCompleted, StepTaken
from databus.staleness import StalenessGate
from echelon.audit.run import terms_of
from echelon.config import RunConfig


@dataclass(frozen=True)
class RecordedBatch:
    """terms: those that held when it was cut."""

    step: int
    group_ids: tuple[str, ...]
    terms: BrokerStarted


class RecordedRun:
    """Where each batch's groups lie; the groups themselves stay on the disk until they are asked for."""

    def __init__(self, journal: Path, config: RunConfig) -> None:
        """Raises: JournalDamaged."""
        self._journal = journal
        self._places: dict[str, Place] = {}
        self._batches: dict[int, RecordedBatch] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        terms = terms_of(config, "")
        for entry in read_journal(journal):
            match entry.record:
                case BrokerStarted() as started:
                    terms = started
                case GroupCompleted(group_id=group_id):
                    self._places[group_id] = entry.place
                case BatchCut(step=step, group_ids=group_ids):
                    self._batches[step] = RecordedBatch(step, group_ids, terms)
                case StepTaken(step=step, metrics=metrics):
                    self.metrics[step] = metrics

    def steps(self) -> range:
        """The newest steps in a row that were taken and whose batches are all here."""
        last = max(self.metrics, default=-1)
        first = last + 1
        while self._has_all(first - 1):
            first -= 1
        return range(first, last + 1)

    def _has_all(self, step: int) -> bool:
        batch = self._batches.get(step)
        return step in self.metrics and batch is not None and all(each in self._places for each in batch.group_ids)

    def max_staleness(self, steps: range) -> int:
        return max(self._batches[step].terms.max_staleness for step in steps)

    def batch(self, step: int) -> tuple[Batch, list[Frame]]:
        """The batch as the learner was given it."""
        recorded = self._batches[step]
        frames: list[Frame] = []
        heads: list[BatchGroup] = []
        for group_id, group in zip(recorded.group_ids, self._groups(recorded), strict=True):
            columns, parts = encode_group(group)
            heads.append(BatchGroup(group_id=group_id, columns=columns, first_frame=len(frames)))
            frames += parts
        return Batch(step=step, max_staleness=recorded.terms.max_staleness, groups=tuple(heads)), frames

    def _groups(self, batch: RecordedBatch) -> Iterator[Group]:
        """Raises: ValueError where a group may not be trained at its step: the audit says more."""
        policy: StalePolicy = batch.terms.stale_policy  # type: ignore[assignment]
        gate = StalenessGate(batch.terms.max_staleness, batch.terms.batch_groups, policy)
        for group_id in batch.group_ids:
            entry = read_record(self._journal, self._places[group_id])
            assert isinstance(entry.record, GroupCompleted)
            group = gate.admit(decode_group(entry.record.columns, entry.frames), batch.step)
            if group is None:
                raise ValueError(f"group {group_id} was too old for step {batch.step}: see `echelon audit`")
            yield group


class RecordedBus:
    """Stands where the learner's connection to the broker stands, and answers from the journal."""

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._asked: list[int] = []

    def send(self, message: Any) -> None:
        assert isinstance(message, BatchRequest), f"a replay does not send {type(message).__name__}"
        self._asked.append(message.step)

    def recv(self, timeout: float) -> tuple[Batch, Sequence[Frame]] | None:
        return self._run.batch(self._asked.pop()) if self._asked else None

    def close(self) -> None:
        pass
