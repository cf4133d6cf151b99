"""The learner's loop: batch, step, publish, report, checkpoint."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from databus.messages import Position, PositionRequest, StepDone
from learner.batch import BatchFeed
from learner.bus import BrokerLink
from learner.checkpoint import state_tensors
from learner.checkpoint_folder import TrainerState, oldest_checkpoint
from learner.checkpoint_saver import CheckpointSaver
from learner.config import LearnerConfig
from learner.memory_copies import MemoryCopies
from learner.model import PolicyModel
from learner.outlet import Outlet
from learner.probe import score_probe
from learner.publisher import Publisher
from learner.train_step import TrainStep
from learner.turn import Always, Turn

logger = logging.getLogger(__name__)

POSITION_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class FirstRank:
    """What only rank 0 has: the connection to the broker, and where versions are put for workers to fetch."""

    broker: BrokerLink
    outlet: Outlet


@dataclass(kw_only=True)
class Trainer:
    """Startup is `run_learner`'s; this is the main loop, the same code on every rank.

    start_step: steps taken before this run began. model: id of the model, for the checkpoint. save_s: how long training
    has stood still for checkpoints since the last report. probe: as `LearnerRun`. turn: on the device, which is taken
    when `run` is called; `feed` gives it while there is no batch.
    """

    config: LearnerConfig
    model: str
    start_step: int
    checkpoints_dir: Path
    world_size: int
    policy: PolicyModel
    train_step: TrainStep
    feed: BatchFeed
    publisher: Publisher
    saver: CheckpointSaver
    copies: MemoryCopies | None
    first_rank: FirstRank | None
    save_s: float = 0.0
    probe: tuple[tuple[int, ...], ...] = ()
    turn: Turn = field(default_factory=Always)

    def run(self) -> None:
        """Raises: RunStoppedError; RuntimeError."""
        self._publish(self.start_step)
        self.publisher.wait()
        for step in range(self.start_step, self.config.steps):
            self._run_step(step)
            if self._checkpoint_due(step + 1):
                self._save(step + 1)
        self.publisher.wait()
        self.turn.give()
        self.saver.wait()

    def serve_until_stopped(self, timeout_s: float) -> None:
        """The last version is still to be evaluated: serve it until the broker ends the run."""
        if self.first_rank is not None:
            self.first_rank.broker.wait_for_stop(timeout_s)

    def _run_step(self, step: int) -> None:
        asked = time.perf_counter()
        groups = self.feed.groups(step)
        waited_s = time.perf_counter() - asked
        self.turn.take()
        # Not before the batch is here: by then the broker has written down the step before. A learner that came back
        # after a step of which the broker knows nothing would wait for ever.
        self._copy(step)
        self.saver.check()
        got = time.perf_counter()
        metrics = self.train_step(groups, step) | self.turn.metrics()
        trained = time.perf_counter()
        self.publisher.wait()
        metrics |= self.publisher.metrics()
        # Weights before metrics: workers wait for the former, nobody for the latter.
        self._publish(step + 1)
        metrics["learner/wait_s"] = waited_s
        metrics["learner/step_s"] = trained - got
        metrics["learner/tokens_per_s"] = metrics["learner/num_tokens"] / (trained - got)
        metrics["learner/publish_s"] = time.perf_counter() - trained
        metrics["learner/save_s"], self.save_s = self.save_s, 0.0
        if self.first_rank is not None:
            self.first_rank.broker.send(StepDone(step=step, metrics=metrics))
            logger.info("step %d: %.0f tokens in %.2f s", step, metrics["learner/num_tokens"], trained - got)

    def _publish(self, version: int) -> None:
        probe = score_probe(self.policy, self.probe, self.config.microbatch_tokens) if self.probe else None
        self.publisher.publish(version, probe)

    def _checkpoint_due(self, steps_done: int) -> bool:
        every = self.config.checkpoint_every
        return steps_done == self.config.steps or (every > 0 and steps_done % every == 0)

    def _save(self, steps_done: int) -> None:
        began = time.perf_counter()
        # The position says which versions are to be evaluated, so the broker is to know of this one.
        self.publisher.wait()
        # Asked before the next batch is: the journal's new segment begins with the state of this step. Older ones go by
        # the checkpoints that are complete, and this one is not.
        state = self._state(steps_done, self._position(steps_done))
        self.saver.save(state, state_tensors(self.policy.causal_lm, self.train_step.optimizer))
        self.save_s += time.perf_counter() - began

    def _copy(self, steps_done: int) -> None:
        if self.copies is None or not self.copies.due(steps_done) or self._checkpoint_due(steps_done):
            return
        began = time.perf_counter()
        tensors = state_tensors(self.policy.causal_lm, self.train_step.optimizer)
        self.copies.save(self._state(steps_done, None), tensors)
        self.save_s += time.perf_counter() - began

    def _state(self, steps_done: int, position: Position | None) -> TrainerState:
        return TrainerState(
            step=steps_done,
            model=self.model,
            world_size=self.world_size,
            position=position,
            lora=self.config.lora,
        )

    def _position(self, steps_done: int) -> Position | None:
        """Where the data stands; only rank 0 needs it, which writes it down."""
        if self.first_rank is None:
            return None
        position, _ = self.first_rank.broker.request(
            PositionRequest(step=steps_done, oldest_checkpoint=oldest_checkpoint(self.checkpoints_dir)),
            Position,
            lambda position: position.step == steps_done,
            POSITION_TIMEOUT_S,
            through_stop=True,  # after the last step the broker may end the run before it reads the question
        )
        return position
