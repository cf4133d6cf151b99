"""A rollout worker of a simulated run: credits, leases, versions, as `rollout.worker`, `rollout.versions` have them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from msgspec import Struct

from databus.codec import Array, Column
from databus.groups import Group
from databus.messages import Cancel, Completed, Heartbeat, Hello, Lease, VersionAnnounced, VersionApplied
from echelon.plan.broker import SimulatedBroker
from echelon.plan.cores import SharedCores
from echelon.plan.costs import Costs
from echelon.plan.engine import EngineGroup, EngineModel
from echelon.plan.events import Events
from echelon.plan.workload import Drawn

COLUMNS = (Column(name="group", dtype="<i4", shape=(0,)),)
"""Stands for the columns that nobody decodes."""

Draw = Callable[[Lease], Drawn]


@dataclass
class _Held:
    lease: Lease
    drawn: Drawn
    group: EngineGroup


class SimulatedWorker:
    """One engine's leases. leased_s: how long it has had a lease for training, until `now`."""

    def __init__(
        self,
        name: str,
        engine: EngineModel,
        *,
        credit: int,
        max_sequences: int,
        costs: Costs,
        events: Events,
        broker: SimulatedBroker,
        cores: SharedCores,
        draw: Draw,
    ) -> None:
        """Args: credit: groups that it holds at once."""
        self._engine = engine
        self._costs = costs
        self._events = events
        self._broker = broker
        self._cores = cores
        self._draw = draw
        self._held: dict[str, _Held] = {}
        self._version = self._announced = 0
        self._is_pulling = self._is_paused = False
        self._turn = 0
        self._leased, self._leased_since, self._leased_s = 0, 0.0, 0.0
        cores.join(self)
        hello = Hello(role="worker", name=name, max_sequences=max_sequences)
        self._peer = broker.join(hello, self.receive)
        self._peer.credits = credit

    @property
    def leased_s(self) -> float:
        return self._leased_s + (self._events.now - self._leased_since if self._leased else 0.0)

    def beat(self) -> None:
        """A heartbeat."""
        beat = Heartbeat(running_sequences=self._engine.running, generated_tokens=self._engine.generated_tokens)
        self._peer.take_heartbeat(beat, self._events.now)

    def set_speed(self, factor: float) -> None:
        self._engine.set_factor(self._events.now, 0.0 if self._is_paused else factor)
        self._plan_end()

    def receive(self, message: Struct) -> None:
        match message:
            case Lease():
                self._begin(message)
            case Cancel(group_ids=group_ids):
                for group_id in group_ids:
                    self._drop(group_id)
            case VersionAnnounced(version=version):
                self._announced = max(self._announced, version)
                self._pull()

    # ------------------------------------------------------------ leases

    def _begin(self, lease: Lease) -> None:
        drawn = self._draw(lease)
        group = self._engine.add(self._events.now, lease.group_id, drawn.lengths, lease.predicted_tokens)
        self._held[lease.group_id] = _Held(lease, drawn, group)
        if lease.purpose == "train":
            self._count(1)
        self._changed()

    def _drop(self, group_id: str) -> None:
        held = self._held.pop(group_id, None)
        if held is not None:
            self._engine.drop(self._events.now, held.group)
            self._free(held.lease)
            self._count(-(held.lease.purpose == "train"))
            self._changed()

    def _changed(self) -> None:
        wanted = self._costs.worker_cores if self._engine.is_busy and not self._is_paused else 0.0
        self._cores.want(self, wanted)
        self._plan_end()

    def _plan_end(self) -> None:
        self._turn += 1
        end, turn = self._engine.next_end(), self._turn
        if end < float("inf"):
            self._events.at(end, lambda: self._ended(turn))

    def _ended(self, turn: int) -> None:
        if turn != self._turn:
            return  # something has happened meanwhile
        for group in self._engine.take_ended(self._events.now):
            self._generated(self._held.pop(group.group_id))
        self._changed()

    def _generated(self, held: _Held) -> None:
        result = _group(held, *self._engine.versions_of(held.group))
        self._free(held.lease)
        self._events.after(self._costs.score_s, lambda: self._broker.say(lambda: self._completed(held.lease, result)))

    def _free(self, lease: Lease) -> None:
        """Its room in the engine."""
        if lease.purpose == "train":
            self._broker.say(self._grant)

    def _grant(self) -> None:
        self._peer.credits += 1

    def _completed(self, lease: Lease, group: Group) -> None:
        """In the broker's turn."""
        if lease.purpose == "train":
            self._count(-1)
        message = Completed(group_id=lease.group_id, columns=COLUMNS, reward_names=("reward",))
        self._broker.results.take(self._peer, message, (), group)

    def _count(self, change: int) -> None:
        now = self._events.now
        if self._leased:
            self._leased_s += now - self._leased_since
        self._leased, self._leased_since = self._leased + change, now

    # ------------------------------------------------------------ versions

    def _pull(self) -> None:
        """Whatever is announced while a version is pulled has to wait, and only the newest of it is pulled then."""
        if self._is_pulling or self._announced <= self._version:
            return
        self._is_pulling = True
        target = self._announced
        self._events.after(max(0.0, self._costs.sync_s - self._costs.pause_s), lambda: self._pause(target))

    def _pause(self, version: int) -> None:
        self._is_paused = True
        self._engine.set_factor(self._events.now, 0.0)
        self._changed()
        self._events.after(self._costs.pause_s, lambda: self._resume(version))

    def _resume(self, version: int) -> None:
        self._is_paused = self._is_pulling = False
        self._version = version
        self._engine.switch(self._events.now, version)
        self._engine.set_factor(self._events.now, self._cores.factor)
        self._changed()
        self._broker.say(lambda: self._applied(version))
        self._pull()

    def _applied(self, version: int) -> None:
        message = VersionApplied(version=version, pause_s=self._costs.pause_s, sync_s=self._costs.sync_s)
        self._broker.leases.applied(self._peer, message)


def _group(held: _Held, versions: Array, tokens: Array) -> Group:
    """Of ones and zeros, as far as nobody looks."""
    lengths = np.array(held.drawn.lengths, np.int32)
    ones, zeros = _ones_and_zeros(int(lengths.sum()))
    return Group(
        prompt_ids=np.array(held.lease.prompt_ids, np.int32),
        lengths=lengths,
        token_ids=zeros,
        logprobs=zeros,
        loss_mask=ones,
        version_values=versions,
        version_lengths=tokens,
        rewards=held.drawn.rewards,
        reward_parts=held.drawn.rewards[:, None],
        truncated=(lengths >= held.lease.sampling.max_tokens).astype(np.uint8),
    )


def _ones_and_zeros(count: int) -> tuple[Array, Array]:
    """uint8 [count] each; not to be written to."""
    ones = np.broadcast_to(np.uint8(1), count)
    return np.ascontiguousarray(ones), np.broadcast_to(np.uint8(0), count)
