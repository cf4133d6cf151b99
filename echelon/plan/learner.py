"""The learner of a simulated run: batch, step, publish, report, as `learner.trainer` has them."""

from collections.abc import Callable
from typing import NamedTuple

from msgspec import Struct

from databus.messages import Batch, BatchRequest, Hello, StepDone, VersionPublished
from echelon.plan.broker import SimulatedBroker
from echelon.plan.cores import SharedCores
from echelon.plan.costs import Costs
from echelon.plan.events import Events


class TrainedStep(NamedTuple):
    """ended_s: since the start. tokens: trained. wait_s: for its batch. leased_s: of all workers, by then."""

    ended_s: float
    tokens: int
    wait_s: float
    leased_s: float


class SimulatedLearner:
    """steps: those that are taken."""

    def __init__(
        self,
        *,
        costs: Costs,
        events: Events,
        broker: SimulatedBroker,
        cores: SharedCores,
        leased_s: Callable[[], float],
    ) -> None:
        """Args: leased_s: of all workers, until now."""
        self._costs = costs
        self._events = events
        self._broker = broker
        self._cores = cores
        self._all_leased_s = leased_s
        self._asked = self._waited = 0.0
        self._tokens = 0
        self._left_s = self._since = 0.0
        self._factor = 1.0
        self._turn = 0
        self.steps: list[TrainedStep] = []
        cores.join(self)
        self._peer = broker.join(Hello(role="learner", name="learner"), self.receive)

    def start(self) -> None:
        self._publish(0)
        self._ask(0)

    def receive(self, message: Struct) -> None:
        if isinstance(message, Batch):
            batch = self._broker.state.batch
            assert batch is not None
            self._waited = self._events.now - self._asked
            self._tokens = sum(sum(waiting.group.loss_tokens[1]) for waiting in batch.groups)
            self._train(message.step)

    def set_speed(self, factor: float) -> None:
        """Only while it trains does it make a difference."""
        self._left_s -= (self._events.now - self._since) * self._factor
        self._since, self._factor = self._events.now, factor
        if self._turn % 2:
            self._turn += 2
            self._plan_end()

    def _train(self, step: int) -> None:
        costs = self._costs
        self._step = step
        self._turn += 1  # odd: at work
        self._left_s = costs.train_s + costs.train_token_s * self._tokens + costs.publish_s
        self._since, self._factor = self._events.now, self._cores.factor
        self._plan_end()
        self._cores.want(self, costs.learner_cores)

    def _plan_end(self) -> None:
        turn = self._turn
        self._events.after(max(0.0, self._left_s) / self._factor, lambda: self._trained(turn))

    def _trained(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._turn += 1
        self._cores.want(self, 0.0)
        step = self._step
        self._publish(step + 1)
        self._broker.say(lambda: self._done(step))
        self._ask(step + 1)

    def _publish(self, version: int) -> None:
        message = VersionPublished(version=version, address="", num_bytes=0)
        self._broker.say(lambda: self._broker.steps.published(message))

    def _done(self, step: int) -> None:
        """In the broker's turn."""
        self._broker.steps.step_done(StepDone(step=step, metrics={}))
        self.steps.append(TrainedStep(self._events.now, self._tokens, self._waited, self._all_leased_s()))

    def _ask(self, step: int) -> None:
        self._asked = self._events.now
        if step < self._broker.state.config.steps:
            self._broker.say(lambda: self._broker.steps.requested(self._peer, BatchRequest(step=step)))
