"""What the broker knows of a run; its desks share it, one thread works on it."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from databus.batches import BatchQueue, CutBatch
from databus.codec import Frame
from databus.config import BrokerConfig
from databus.evaluation import Evaluations
from databus.leases import Leases
from databus.ledger import Ledger
from databus.messages import Position, VersionPublished
from databus.peers import Peers
from databus.prompts import GroupFilter, Prompt, PromptSource
from databus.scheduling import MostCredit, Placement, Scheduler
from databus.staleness import StalenessGate
from databus.step_metrics import StepMetrics


class RunFailed(RuntimeError):
    """The run cannot go on; the text is its first cause, one line for a person."""


class LearnerLost(RunFailed):
    """The learner has gone; what made it go is its own to tell."""


class Send(Protocol):
    def __call__(self, peer: str, message: Struct, frames: Sequence[Frame] = ()) -> bool:
        """False if the peer is gone."""
        ...


@dataclass
class RunState:
    """step: the next one to be trained. versions: published ones, newest last. batch: cut, not done yet; batch_cut:
    when, on the monotonic clock."""

    config: BrokerConfig
    prompts: PromptSource
    evals: Sequence[Prompt]
    filters: Sequence[GroupFilter]
    send: Send
    ledger: Ledger
    gate: StalenessGate
    leases: Leases
    queue: BatchQueue
    evaluations: Evaluations
    peers: Peers
    metrics: StepMetrics
    step: int
    versions: dict[int, VersionPublished] = field(default_factory=dict)
    batch: CutBatch | None = None
    batch_cut: float = 0.0
    requested: int | None = None
    scheduler: Scheduler | None = None
    placement: Placement = field(default_factory=MostCredit)
    progress: float = field(default_factory=time.monotonic)

    @property
    def newest(self) -> int | None:
        """The newest published version; None before the learner is ready."""
        return max(self.versions, default=None)

    @property
    def accepted(self) -> int:
        """Groups that steps taken have used up, and completed ones; whatever the batch size was before a resumption."""
        return self.step * self.config.batch_groups + self.ledger.completed

    def held_by_worker(self) -> dict[str, int]:
        """Groups that each worker holds, problems of an evaluation among them."""
        held = Counter(self.leases.by_worker())
        if self.evaluations.current is not None:
            held.update(worker for worker, _ in self.evaluations.current.leased.values())
        return held

    def touch(self) -> None:
        """Something went forward."""
        self.progress = time.monotonic()


def new_state(
    config: BrokerConfig,
    prompts: PromptSource,
    evals: Sequence[Prompt],
    filters: Sequence[GroupFilter],
    send: Send,
    position: Position | None,
    scheduler: Scheduler | None = None,
    placement: Placement | None = None,
) -> RunState:
    """The state at the run's start, or at the checkpoint that `position` comes from."""
    gate = StalenessGate(config.max_staleness, config.batch_groups, config.stale_policy)
    ledger = (
        Ledger(config.run_id)
        if position is None
        else Ledger(config.run_id, position.next_cursor, position.pending, position.counts)
    )
    return RunState(
        config=config,
        prompts=prompts,
        evals=evals,
        filters=filters,
        send=send,
        ledger=ledger,
        gate=gate,
        leases=Leases(config.bus.lease_s),
        queue=BatchQueue(gate),
        evaluations=Evaluations(
            len(evals), config.eval_every, config.steps, config.eval_threshold, config.eval_timeout_s
        ),
        peers=Peers(config.bus.peer_timeout_s, config.bus.heartbeat_s),
        metrics=StepMetrics(),
        step=config.start_step,
        scheduler=scheduler,
        placement=placement or MostCredit(),
    )
