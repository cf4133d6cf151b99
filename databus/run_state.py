"""What the broker knows of a run; its desks share it, one thread works on it."""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from databus.batches import BatchQueue, CutBatch
from databus.chronicle import Chronicle
from databus.codec import Frame
from databus.config import BrokerConfig
from databus.evaluation import Evaluations
from databus.history import CompletionHistory
from databus.leases import Held, Leases
from databus.ledger import Ledger
from databus.messages import Position, VersionAnnounced, VersionPublished
from databus.outbox import Outbox
from databus.peers import Peers
from databus.prompts import GroupFilter, Prompt, PromptSource
from databus.scheduling import MostCredit, Placement, Scheduler
from databus.staleness import StalenessGate
from databus.step_metrics import StepMetrics


class RunFailed(RuntimeError):
    """The run cannot go on; the text is its first cause, one line for a person."""


@dataclass
class RunState:
    """step: the next one to be trained. versions: published ones, newest last. batch: cut, not done yet; batch_cut:
    when, on `clock`, seconds that only grow.

    trained: places in the journal, packed, of the groups of each step that was taken.
    refusal: the newest version that an engine refused, and why. history: earlier completions; None: nobody drafts.
    """

    config: BrokerConfig
    prompts: PromptSource
    evals: Sequence[Prompt]
    filters: Sequence[GroupFilter]
    outbox: Outbox
    ledger: Ledger
    gate: StalenessGate
    leases: Leases
    queue: BatchQueue
    evaluations: Evaluations
    chronicle: Chronicle
    peers: Peers
    metrics: StepMetrics
    step: int
    versions: dict[int, VersionPublished] = field(default_factory=dict)
    batch: CutBatch | None = None
    batch_cut: float = 0.0
    requested: int | None = None
    scheduler: Scheduler | None = None
    placement: Placement = field(default_factory=MostCredit)
    trained: dict[int, "array[int]"] = field(default_factory=dict)
    refusal: str = ""
    history: CompletionHistory | None = None
    clock: Callable[[], float] = time.monotonic
    progress: float = field(init=False)

    def __post_init__(self) -> None:
        self.touch()

    @property
    def newest_known(self) -> int:
        """The newest version that anybody may have: the learner may not have told a new broker yet."""
        published = self.config.start_step if self.newest is None else self.newest
        return max(published, self.step + (self.batch is not None))

    def send(self, peer: str, message: Struct, frames: Sequence[Frame] = ()) -> bool:
        """Once what it promises is durable. False if the peer is gone."""
        return self.outbox.send(peer, message, frames)

    @property
    def newest(self) -> int | None:
        """The newest published version; None before the learner is ready."""
        return max(self.versions, default=None)

    @property
    def published(self) -> VersionAnnounced | None:
        """The newest version, for those who are told of none."""
        if self.newest is None:
            return None
        newest = self.versions[self.newest]
        return VersionAnnounced(version=newest.version, address=newest.address, num_bytes=newest.num_bytes)

    @property
    def accepted(self) -> int:
        """Groups that steps taken have used up, and completed ones; whatever the batch size was before a resumption."""
        return self.step * self.config.batch_groups + self.ledger.completed

    def add_lease(self, group_id: str, cursor: int, worker: str, now: float) -> Held:
        """A worker holds the group of this cursor. Args: now: on the monotonic clock."""
        prompt = self.prompts.get(cursor)  # first: a scheduler draws the problem of a new cursor
        predicted = 0 if self.scheduler is None else self.scheduler.predicted_tokens(cursor)
        return self.leases.add(group_id, worker, prompt, now, predicted * self.config.group_size)

    def held_by_worker(self) -> dict[str, int]:
        """Groups that each worker holds, problems of an evaluation among them."""
        held = Counter(self.leases.by_worker())
        if self.evaluations.current is not None:
            held.update(worker for worker, _ in self.evaluations.current.leased.values())
        return held

    def touch(self) -> None:
        """Something went forward."""
        self.progress = self.clock()


def new_state(
    config: BrokerConfig,
    prompts: PromptSource,
    evals: Sequence[Prompt],
    filters: Sequence[GroupFilter],
    outbox: Outbox,
    position: Position | None,
    chronicle: Chronicle,
    scheduler: Scheduler | None = None,
    placement: Placement | None = None,
    accuracies: Mapping[int, float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RunState:
    """The state at the run's start, or at the checkpoint that `position` comes from.

    Args: accuracies: of versions that were evaluated before. clock: `echelon.plan` has a simulated one.
    """
    gate = StalenessGate(config.max_staleness, config.batch_groups, config.stale_policy)
    ledger = (
        Ledger(config.run_id, on_transition=chronicle.moved)
        if position is None
        else Ledger(config.run_id, position.next_cursor, position.pending, position.counts, chronicle.moved)
    )
    return RunState(
        config=config,
        prompts=prompts,
        evals=evals,
        filters=filters,
        outbox=outbox,
        ledger=ledger,
        gate=gate,
        leases=Leases(config.bus.lease_s),
        queue=BatchQueue(gate),
        evaluations=Evaluations(
            len(evals), config.eval_every, config.steps, config.eval_threshold, config.eval_timeout_s, accuracies, clock
        ),
        chronicle=chronicle,
        peers=Peers(config.bus.peer_timeout_s, config.bus.heartbeat_s, clock),
        metrics=StepMetrics(clock),
        step=config.start_step,
        scheduler=scheduler,
        placement=placement or MostCredit(),
        history=None if config.history is None else CompletionHistory(config.history),
        clock=clock,
    )
