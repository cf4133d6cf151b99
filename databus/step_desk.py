"""The learner's side of the broker: batches out, steps and versions in, rows of metrics."""

import logging
import time

from databus.evaluation import Evaluation
from databus.ledger import Entry
from databus.messages import BatchRequest, Cancel, Position, PositionRequest, Refused, StepDone, VersionPublished
from databus.peers import Peer
from databus.prompts import MetricsSink, SampledGroup
from databus.run_state import RunState
from databus.step_metrics import RowQueue

logger = logging.getLogger(__name__)

SAMPLED_GROUPS = 2


class StepDesk:
    """Hands batches to the learner and keeps count of steps."""

    def __init__(self, state: RunState, sink: MetricsSink) -> None:
        self._state = state
        self._sink = sink
        self._rows = RowQueue(sink.write)
        self._has_last_row = False

    def finished(self) -> bool:
        """All steps are taken, all evaluations done, all rows written."""
        state = self._state
        return (
            state.step >= state.config.steps
            and not state.evaluations.awaits_last_version()
            and state.evaluations.current is None
            and not len(self._rows)
        )

    def requested(self, learner: Peer, message: BatchRequest) -> None:
        """Note that the learner is ready for a batch; the same one again where it asks again."""
        state = self._state
        if message.step != state.step:
            state.send(learner.name, Refused(reason=f"batch {message.step} asked for, the run is at {state.step}"))
            return
        state.requested = message.step
        if state.batch is not None:
            self._send_batch(learner)

    def cut(self) -> None:
        """Hand over the batch that was asked for, as soon as enough fresh groups are in."""
        state = self._state
        learner = state.peers.learner
        if state.requested is None or state.batch is not None or learner is None:
            return
        state.batch = state.queue.cut(state.requested, self._settle_stale)
        if state.batch is not None:
            state.batch_cut = time.monotonic()
            state.touch()
            self._send_batch(learner)

    def _settle_stale(self, entry: Entry) -> None:
        logger.info("group %s is too old for step %s", entry.group_id, self._state.requested)
        if self._state.config.stale_policy == "requeue":
            self._state.ledger.requeue(entry)
        else:
            self._state.ledger.settle(entry, "stale")

    def _send_batch(self, learner: Peer) -> None:
        assert self._state.batch is not None
        message, frames = self._state.batch.message(self._state.config.max_staleness)
        self._state.send(learner.name, message, frames)

    def step_done(self, message: StepDone) -> None:
        """A step was taken: its groups are trained, its row can be made."""
        state = self._state
        batch = state.batch
        if batch is None or message.step != batch.step:
            logger.warning("step %d reported, which is not under way", message.step)
            return
        for waiting in batch.groups:
            state.ledger.settle(waiting.entry, "trained")
        for worker in state.peers.workers():
            state.metrics.heard(worker)
        row = state.metrics.row(batch, message.metrics, len(state.queue), state.ledger.counts())
        if state.scheduler is not None:
            still_open = {cursor for cursor, _ in state.ledger.pending_at(message.step + 1)}
            row |= state.scheduler.stepped([waiting.entry.cursor for waiting in batch.groups], still_open)
        self._rows.add(row)
        chosen = [SampledGroup(item.prompt, item.group) for item in batch.groups[:SAMPLED_GROUPS]]
        self._sink.samples(batch.step, chosen)
        state.batch, state.requested, state.step = None, None, message.step + 1
        state.touch()
        self._add_last_row()

    def _add_last_row(self) -> None:
        """The last version has no step, but an evaluation; the learner may report it before or after its last step."""
        state = self._state
        if state.step == state.config.steps and state.evaluations.is_known(state.step) and not self._has_last_row:
            self._has_last_row = True
            self._rows.add({"step": state.step, "time_s": state.metrics.elapsed_s()})

    def published(self, message: VersionPublished) -> None:
        state = self._state
        state.versions[message.version] = message
        for version in sorted(state.versions)[: -(state.config.max_staleness + 2)]:
            del state.versions[version]
        state.evaluations.published(message.version)
        state.touch()
        self._add_last_row()

    def position(self, learner: Peer, message: PositionRequest) -> None:
        state = self._state
        position = Position(
            step=message.step,
            next_cursor=state.ledger.next_cursor,
            pending=state.ledger.pending_at(message.step),
            counts=state.ledger.counts(),
            scheduling=b"" if state.scheduler is None else state.scheduler.save(),
        )
        state.send(learner.name, position)

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
