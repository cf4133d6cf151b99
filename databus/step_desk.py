"""The learner's side of the broker: batches out, steps and versions in, rows of metrics."""

import logging
import secrets
from array import array
from collections.abc import Mapping

from msgspec.structs import replace

from databus.batches import CutBatch, Waiting
from databus.evaluation import Evaluation
from databus.groups import decode_group
from databus.ledger import Entry
from databus.messages import BatchFrames, BatchRequest, Cancel, Hello, Position, Refused, StepDone, VersionPublished
from databus.peers import Peer
from databus.prompts import MetricsSink, SampledGroup
from databus.records import GroupCompleted
from databus.run_state import RunState
from databus.step_metrics import RowQueue

logger = logging.getLogger(__name__)

SAMPLED_GROUPS = 2


class StepDesk:
    """Hands batches to the learner and keeps count of steps. rows_written: of so many steps."""

    def __init__(self, state: RunState, sink: MetricsSink, first_row: int = 0) -> None:
        """Args: first_row: rows of earlier steps were written by a broker before this one."""
        self._state = state
        self._first_row = self.rows_written = first_row
        self._sink = sink
        self._rows = RowQueue(self._write_row)
        self._has_last_row = False
        self._learner_done = False
        self._learner: tuple[str, int] | None = None

    def _write_row(self, row: Mapping[str, float]) -> None:
        if row["step"] >= self._first_row:
            self._sink.write(row)
            self.rows_written = int(row["step"]) + 1

    def finished(self) -> bool:
        """All steps are taken, all evaluations done, all rows written.

        The learner has to say so to this broker: one that came back takes its last steps again, for its checkpoint.
        """
        state = self._state
        return (
            state.step >= state.config.steps
            and self._learner_done
            and not state.evaluations.awaits_last_version()
            and state.evaluations.current is None
            and not len(self._rows)
        )

    def requested(self, learner: Peer, message: BatchRequest) -> None:
        """Note that the learner is ready for a batch; the same one again where it asks again."""
        state = self._state
        if state.batch is not None and message.step == state.batch.step + 1:
            return  # the report of the step before is on its way, or was lost and will come again
        if message.step in state.trained:
            state.touch()
            self._send(learner, self._batch_of(message.step))
            return
        if message.step != state.step:
            state.send(learner.name, Refused(reason=f"batch {message.step} asked for, the run is at {state.step}"))
            return
        state.requested = message.step
        if state.batch is not None:
            self._send(learner, state.batch)

    def learner_joined(self, hello: Hello) -> None:
        """Another one: nobody answers any more where the one before served its versions."""
        process = (hello.host, hello.pid)
        if process != self._learner:
            self._learner = process
            self._state.versions.clear()
            self._learner_done = hello.version >= self._state.config.steps

    def _batch_of(self, step: int) -> CutBatch:
        """The batch of a step that was taken, as it was, from the journal. Raises: JournalDamaged."""
        waiting: list[Waiting] = []
        for place in self._state.trained[step]:
            _, record, frames = self._state.chronicle.read(place)
            assert isinstance(record, GroupCompleted)
            group = self._state.gate.admit(decode_group(record.columns, frames), step)
            assert group is not None
            entry = Entry(record.group_id, cursor=-1, attempt=-1, order=-1, next_attempt=-1)
            waiting.append(Waiting(entry, group, record.reward_names, ""))
        return CutBatch(step, tuple(waiting))

    def cut(self) -> None:
        """Hand over the batch that was asked for, as soon as enough fresh groups are in."""
        state = self._state
        learner = state.peers.learner
        if state.requested is None or state.batch is not None or learner is None:
            return
        state.batch = state.queue.cut(state.requested, self._settle_stale)
        if state.batch is not None:
            state.batch_cut = state.clock()
            state.touch()
            state.chronicle.cut(state.batch)
            self._send_ahead(learner, state.batch)

    def _settle_stale(self, entry: Entry) -> None:
        logger.info("group %s is too old for step %s", entry.group_id, self._state.requested)
        requeued = self._state.config.stale_policy == "requeue"
        self._state.chronicle.stale(entry, requeued)
        if requeued:
            self._state.ledger.requeue(entry)
        else:
            self._state.ledger.settle(entry, "stale")

    def _send(self, learner: Peer, batch: CutBatch) -> None:
        message, frames = batch.message(self._state.config.max_staleness)
        self._state.send(learner.name, message, frames)

    def _send_ahead(self, learner: Peer, batch: CutBatch) -> None:
        """Its frames travel while the disk is at work, and the learner may use them once that is done."""
        message, frames = batch.message(self._state.config.max_staleness)
        frames_id = secrets.randbits(63) | 1
        if self._state.outbox.send_ahead(learner.name, BatchFrames(id=frames_id), frames):
            message, frames = replace(message, frames_id=frames_id), []
        self._state.send(learner.name, message, frames)

    def step_done(self, message: StepDone) -> None:
        """A step was taken: its groups are trained, its row can be made."""
        state = self._state
        batch = state.batch
        self._learner_done |= message.step == state.config.steps - 1
        if batch is None or message.step != batch.step:
            logger.warning("step %d reported, which is not under way", message.step)
            return
        state.chronicle.stepped(message)
        self.take_step(batch, message.metrics)

    def take_step(self, batch: CutBatch, metrics: Mapping[str, float]) -> None:
        """The batch is trained, and its row can be made."""
        state = self._state
        for waiting in batch.groups:
            state.ledger.settle(waiting.entry, "trained")
        for worker in state.peers.workers():
            state.metrics.heard(worker)
        row = state.metrics.row(batch, metrics, len(state.queue), state.ledger.counts())
        if state.scheduler is not None:
            still_open = {cursor for cursor, _ in state.ledger.pending_at(batch.step + 1)}
            row |= state.scheduler.stepped([waiting.entry.cursor for waiting in batch.groups], still_open)
        if batch.step >= self._first_row:  # before the row: who reads that finds them
            chosen = [SampledGroup(item.prompt, item.group) for item in batch.groups[:SAMPLED_GROUPS]]
            self._sink.samples(batch.step, chosen)
        self._add_row(row)
        if all(waiting.place >= 0 for waiting in batch.groups):
            state.trained[batch.step] = array("Q", [waiting.place for waiting in batch.groups])
        state.batch, state.requested, state.step = None, None, batch.step + 1
        state.touch()
        self._add_last_row()

    def _add_last_row(self) -> None:
        """The last version has no step, but an evaluation; the learner may report it before or after its last step."""
        state = self._state
        if state.step == state.config.steps and state.evaluations.is_known(state.step) and not self._has_last_row:
            self._has_last_row = True
            self._add_row({"step": state.step, "time_s": state.metrics.elapsed_s()})

    def _add_row(self, row: dict[str, float]) -> None:
        self._state.outbox.then(lambda: self._rows.add(row))

    def published(self, message: VersionPublished) -> None:
        state = self._state
        state.versions[message.version] = message
        for version in sorted(state.versions)[: -(state.config.max_staleness + 2)]:
            del state.versions[version]
        if message.version >= state.step:  # earlier ones had their turn before the learner came back to them
            state.evaluations.published(message.version)
        state.touch()
        self._add_last_row()

    def position(self, learner: Peer, step: int, saved: Position | None) -> None:
        """Args: saved: as the journal has it; None where it has not."""
        state = self._state
        position = saved or Position(
            step=step,
            next_cursor=state.ledger.next_cursor,
            pending=state.ledger.pending_at(step),
            counts=state.ledger.counts(),
            scheduling=b"" if state.scheduler is None else state.scheduler.save(),
        )
        state.send(learner.name, replace(position, accuracies=state.evaluations.accuracies()))

    def tick(self, now: float) -> None:
        """Close evaluations, write the rows that nothing holds back any more."""
        while closed := self._state.evaluations.tick(now):
            self._state.touch()
            self._cancel(closed)
        evaluations = self._state.evaluations
        self._rows.flush(evaluations.is_pending, evaluations.take_result)

    def _cancel(self, evaluation: Evaluation) -> None:
        """Where it was abandoned: its problems would only keep engines busy."""
        for group_id, (worker, _) in evaluation.leased.items():
            self._state.send(worker, Cancel(group_ids=(group_id,)))
