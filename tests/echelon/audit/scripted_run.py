"""A run without processes: the broker's own ledger and queue, and the records, rows and checkpoints that they give.

`write` puts it on disk. What a test changes in `records` or `rows` before that is a run that broke its promises.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from scripted import make_group

from databus.batches import BatchQueue, CutBatch, Waiting
from databus.codec import Frame
from databus.config import StalePolicy
from databus.groups import Group, decode_group, encode_group
from databus.journal import Journal, read_journal, segment_path, segments
from databus.ledger import Entry, Ledger
from databus.messages import Position
from databus.records import (
    BatchCut,
    BrokerEnded,
    BrokerStarted,
    GroupCompleted,
    GroupLeased,
    GroupMoved,
    OpenGroup,
    Record,
    StateSaved,
    StepTaken,
)
from databus.staleness import StalenessGate
from databus.step_metrics import StepMetrics
from echelon.audit.run import AuditReport, audit_run
from echelon.config import DataConfig, RunConfig
from echelon.metrics import RowWriter
from echelon.run_folder import RunFolder, RunRecord
from learner.checkpoint_folder import TrainerState, finish_checkpoint, start_checkpoint
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

RUN_ID = "scripted"
GROUP_SIZE = 2
BATCH_GROUPS = 2
MAX_STALENESS = 1

Item = tuple[Record, Sequence[Frame]]


class JournalRecords:
    """A journal's records in a list, where a test can change them."""

    def __init__(self, records: list[Item]) -> None:
        self.records = records

    @classmethod
    def read(cls, folder: Path) -> "JournalRecords":
        return cls([(entry.record, entry.frames) for entry in read_journal(folder)])

    def where(self, kind: type, **fields: Any) -> list[int]:
        """Indices of records of a kind."""
        return [
            index
            for index, (record, _) in enumerate(self.records)
            if isinstance(record, kind) and all(getattr(record, name) == value for name, value in fields.items())
        ]

    def change(self, index: int, **fields: Any) -> None:
        record, frames = self.records[index]
        self.records[index] = (msgspec.structs.replace(record, **fields), frames)

    def group(self, index: int) -> Group:
        record, frames = self.records[index]
        assert isinstance(record, GroupCompleted)
        return decode_group(record.columns, frames)

    def change_group(self, index: int, **columns: Any) -> None:
        """Other columns for a completed group."""
        described, frames = encode_group(replace(self.group(index), **columns))
        self.change(index, columns=described)
        self.records[index] = (self.records[index][0], frames)

    def write_journal(self, folder: Path) -> None:
        """A segment for every state that was saved."""
        journal = Journal(folder)
        for index, (record, frames) in enumerate(self.records):
            if isinstance(record, StateSaved) and index:
                journal.roll([(record, ())])
            else:
                journal.append(record, frames)
        journal.close()


class ScriptedRun(JournalRecords):
    """Two groups of two completions a batch, at most one version behind."""

    def __init__(self, stale_policy: StalePolicy = "drop") -> None:
        super().__init__([])
        self.rows: list[dict[str, Any]] = []
        self.positions: dict[int, Position] = {}
        self.step = 0
        self.stale_policy: StalePolicy = stale_policy
        self.ledger = Ledger(RUN_ID, on_transition=self._on_transition)
        self.queue = BatchQueue(StalenessGate(MAX_STALENESS, BATCH_GROUPS, stale_policy))
        self.waiting: dict[str, Waiting] = {}
        self._metrics = StepMetrics()
        self.start()

    # ------------------------------------------------------------ what may happen

    def start(self) -> None:
        self._add(
            BrokerStarted(
                run_id=RUN_ID,
                steps=100,
                group_size=GROUP_SIZE,
                batch_groups=BATCH_GROUPS,
                max_staleness=MAX_STALENESS,
                stale_policy=self.stale_policy,
                max_tokens=8,
            )
        )

    def lease(self) -> Entry:
        return self.ledger.lease()

    def complete(self, entry: Entry, versions: Sequence[Sequence[int]] | None = None, **more: Any) -> Waiting:
        """Args: versions: of each completion's tokens; by default three tokens of the newest version."""
        group = make_group((1, entry.cursor + 1), versions or [[self.step] * 3] * GROUP_SIZE, **more)
        waiting = Waiting(entry, group, ("reward",), "prompt")
        self.waiting[entry.group_id] = waiting
        self.ledger.complete(entry)
        if group.loss_versions is None:
            self.settle(entry, "stale")
        else:
            self.queue.add(waiting)
        return waiting

    def filter(self, entry: Entry) -> None:
        """Completed, and kept out at once."""
        group = make_group((1, entry.cursor + 1), [[self.step]] * GROUP_SIZE)
        self.waiting[entry.group_id] = Waiting(entry, group, ("reward",), "prompt")
        self.ledger.complete(entry)
        self.settle(entry, "filtered")

    def settle(self, entry: Entry, state: Any) -> None:
        self.ledger.settle(entry, state)
        self.waiting.pop(entry.group_id, None)

    def cut(self) -> CutBatch | None:
        batch = self.queue.cut(self.step, self._settle_stale)
        if batch is not None:
            self._add(BatchCut(step=self.step, group_ids=tuple(item.entry.group_id for item in batch.groups)))
        return batch

    def train(self, batch: CutBatch) -> None:
        metrics = {"loss/policy": 0.5 + batch.step, "learner/grad_norm": 0.1}
        for item in batch.groups:
            self.settle(item.entry, "trained")
        self._add(StepTaken(step=batch.step, metrics=metrics))
        self.rows.append(self._metrics.row(batch, metrics, len(self.queue), self.ledger.counts()))
        self.step += 1

    def save(self) -> None:
        """A checkpoint after `step` steps."""
        position = Position(
            step=self.step,
            next_cursor=self.ledger.next_cursor,
            pending=self.ledger.pending_at(self.step),
            counts=self.ledger.counts(),
        )
        self.positions[self.step] = position
        open_groups = tuple(self._open(entry) for entry in self.ledger._open.values())
        self._add(
            StateSaved(
                step=self.step,
                next_cursor=position.next_cursor,
                num_leases=self.ledger._num_leases,
                pending=position.pending,
                counts=position.counts,
                groups=open_groups,
                num_copies=len(self.waiting),
            )
        )
        for waiting in list(self.waiting.values()):
            self._add_completed(waiting, copied=True)

    def _open(self, entry: Entry) -> OpenGroup:
        state: Any = entry.state
        return OpenGroup(
            group_id=entry.group_id,
            cursor=entry.cursor,
            attempt=entry.attempt,
            order=entry.order,
            next_attempt=entry.next_attempt,
            state=state,
        )

    def end(self, ok: bool = True) -> None:
        self._add(BrokerEnded(ok=ok))

    # ------------------------------------------------------------ stories

    def batch(self) -> CutBatch:
        """Lease and complete until a batch can be cut."""
        while (batch := self.cut()) is None:
            self.complete(self.lease())
        return batch

    def steps(self, count: int) -> "ScriptedRun":
        for _ in range(count):
            self.train(self.batch())
        return self

    # ------------------------------------------------------------ records

    def _add(self, record: Record, frames: Sequence[Frame] = ()) -> None:
        self.records.append((record, frames))

    def _on_transition(self, entry: Entry, state: str) -> None:
        if state == "leased":
            self._add(
                GroupLeased(group_id=entry.group_id, cursor=entry.cursor, attempt=entry.attempt, worker="worker-0")
            )
        elif state == "completed":
            self._add_completed(self.waiting[entry.group_id])
        elif state != "trained":
            self._add(GroupMoved(group_id=entry.group_id, state=state))  # type: ignore[arg-type]

    def _add_completed(self, waiting: Waiting, copied: bool = False) -> None:
        columns, frames = encode_group(waiting.group)
        record = GroupCompleted(
            group_id=waiting.entry.group_id, worker="worker-0", columns=columns, reward_names=("reward",), copied=copied
        )
        self._add(record, frames)

    def _settle_stale(self, entry: Entry) -> None:
        self.waiting.pop(entry.group_id, None)
        if self.stale_policy == "requeue":
            self.ledger.requeue(entry)
            self.records[-1] = (msgspec.structs.replace(self.records[-1][0], requeued=True), ())
        else:
            self.ledger.settle(entry, "stale")

    # ------------------------------------------------------------ on disk

    def write(self, path: Path, drop_before: int = 0) -> RunFolder:
        """A run's folder. Args: drop_before: the first segment that is kept."""
        folder = RunFolder(path)
        path.mkdir(parents=True)
        self.write_journal(folder.journal)
        for number in segments(folder.journal):
            if number < drop_before:
                segment_path(folder.journal, number).unlink()
        config = RunConfig(
            model="none",
            data=DataConfig(train="none"),
            group_size=GROUP_SIZE,
            batch_groups=BATCH_GROUPS,
            max_staleness=MAX_STALENESS,
            stale_policy=self.stale_policy,
            learner=LearnerConfig(steps=100),
            rollout=RolloutConfig(max_tokens=8),
        )
        folder.config_file.write_bytes(msgspec.json.encode(config))
        folder.record_file.write_bytes(msgspec.json.encode(RunRecord(run_id=RUN_ID, recipe="none")))
        writer = RowWriter(folder.metrics_file)
        for row in self.rows:
            writer.write(row)
        writer.close()
        for step, position in self.positions.items():
            temporary = start_checkpoint(folder.checkpoints, step)
            (temporary / "weights").write_bytes(b"some weights")
            state = TrainerState(step=step, model="none", world_size=1, position=position)
            finish_checkpoint(folder.checkpoints, state, keep=100)
        return folder

    def audit(self, path: Path, drop_before: int = 0) -> AuditReport:
        return audit_run(self.write(path, drop_before))
