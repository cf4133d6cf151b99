"""The broker of a simulated run: databus' own state and desks, taking turns as `databus.broker` has them take turns."""

from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from databus.chronicle import Chronicle
from databus.codec import Frame
from databus.config import BrokerConfig
from databus.lease_desk import LeaseDesk
from databus.messages import Hello
from databus.outbox import Outbox
from databus.peers import Peer
from databus.prompts import GroupFilter, MetricsSink, Prompt, PromptSource
from databus.result_desk import ResultDesk
from databus.run_state import new_state
from databus.scheduling import Scheduler
from databus.step_desk import StepDesk
from echelon.plan.events import Events
from rollout.scheduling.placement import LeastRemaining

Receive = Callable[[Struct], None]

TICK_S = 2.0
"""Deadlines of leases are minutes; looking for overdue ones every turn would take longer than all else."""
PEER_TURN_S = 2e-6
"""Of each turn, for each peer: what the real one's loops over all workers take."""


class Delivery(Outbox):
    """What is said reaches its receiver some time after the turn."""

    def __init__(self, events: Events, delay_s: float) -> None:
        self._events = events
        self._delay_s = delay_s
        self._receivers: dict[str, Receive] = {}
        self._said: list[tuple[Receive, Struct]] = []

    def seat(self, peer: str, receive: Receive) -> None:
        self._receivers[peer] = receive

    def send(self, peer: str, message: Struct, frames: Sequence[Frame] = ()) -> bool:
        self._said.append((self._receivers[peer], message))
        return True

    def send_ahead(self, peer: str, message: Struct, frames: Sequence[Frame]) -> bool:
        return True  # its bytes are of no interest

    def then(self, action: Callable[[], object]) -> None:
        action()

    def flush(self) -> None:
        said, self._said = self._said, []
        if said:
            self._events.after(self._delay_s, lambda: _deliver(said))


def _deliver(said: Sequence[tuple[Receive, Struct]]) -> None:
    for receive, message in said:
        receive(message)


class SimulatedBroker:
    """Takes what is said to it in turns, and answers. Everything that it decides, databus decides."""

    def __init__(
        self,
        events: Events,
        config: BrokerConfig,
        prompts: PromptSource,
        evals: Sequence[Prompt],
        *,
        filters: Sequence[GroupFilter],
        scheduler: Scheduler,
        sink: MetricsSink,
        bus_s: float,
    ) -> None:
        """Args: bus_s: a message's way in, and its way out."""
        self._events = events
        self._bus_s = bus_s
        self._outbox = Delivery(events, bus_s)
        self.state = new_state(
            config,
            prompts,
            evals,
            filters,
            self._outbox,
            None,
            Chronicle(),
            scheduler,
            LeastRemaining(),
            clock=events.clock,
        )
        self.leases = LeaseDesk(self.state)
        self.results = ResultDesk(self.state, self.leases)
        self.steps = StepDesk(self.state, sink)
        self._inbox: list[Callable[[], None]] = []
        self._next_tick = self._next_turn = 0.0
        self._num_peers = 0
        self.state.metrics.start()

    def join(self, hello: Hello, receive: Receive) -> Peer:
        self._outbox.seat(hello.name, receive)
        self._num_peers += 1
        peer = self.state.peers.add(hello, b"")
        if hello.role == "learner":
            self.steps.learner_joined(hello)
        return peer

    def say(self, action: Callable[[], None]) -> None:
        """A message to the broker: what it does with it."""
        if not self._inbox:
            self._events.at(max(self._events.now + self._bus_s, self._next_turn), self._turn)
        self._inbox.append(action)

    def _turn(self) -> None:
        now = self._events.now
        self._next_turn = now + PEER_TURN_S * self._num_peers
        inbox, self._inbox = self._inbox, []
        for action in inbox:
            action()
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self.leases.tick(now)
        self.steps.tick(now)
        self.leases.announce()
        self.leases.lease_all()
        self.steps.cut()
        self._outbox.flush()


class Rows(MetricsSink):
    """The rows of a run, as `metrics.jsonl` would have them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))

    def samples(self, step: int, groups: Sequence[object]) -> None: ...

    def rows_from(self, first: int) -> Sequence[str]:
        return ()  # nobody watches
