"""Who is connected: roles, heartbeats, credits, versions."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from databus.messages import (
    PROTOCOL,
    BatchRequest,
    Completed,
    Credits,
    Failed,
    Goodbye,
    Heartbeat,
    Hello,
    Holding,
    Leaving,
    PositionRequest,
    Released,
    Role,
    Standing,
    StatusRequest,
    StepDone,
    ToBroker,
    VersionApplied,
    VersionPublished,
    VersionRefused,
    WorkerStatus,
)
from databus.speed import Speed

MAY_SEND: dict[Role, tuple[type, ...]] = {
    "worker": (
        Heartbeat,
        Goodbye,
        Credits,
        Holding,
        Completed,
        Failed,
        Released,
        VersionApplied,
        VersionRefused,
        Leaving,
    ),
    "learner": (Heartbeat, Goodbye, BatchRequest, StepDone, VersionPublished, PositionRequest),
    "observer": (Heartbeat, Goodbye, StatusRequest),
}

MISSED_HEARTBEATS = 2

LATE, LATE_S = 1.5, 0.5
"""A worker that was told of a version is waited for so much longer than it took the first."""


@dataclass
class Peer:
    """route: of its connection. version: what a worker serves. announced: the newest version it was told of, and when.
    refused: the newest version that its engine has refused.

    update_s: from being told of the last version that it took up until it served it; 0: there was none yet.
    credits: of `Credits.total`. standing: whether a worker gets leases. received_tokens: of
    `Heartbeat.generated_tokens`, those whose groups have come in, or never will.
    """

    hello: Hello
    route: bytes
    heard: float
    version: int
    announced: int
    announced_at: float = 0.0
    announced_address: str = ""
    update_s: float = 0.0
    credits: int = 0
    leases_sent: int = 0
    received_tokens: int = 0
    beat: Heartbeat = field(default_factory=Heartbeat)
    speed: Speed = field(default_factory=Speed)
    standing: Standing = "working"
    joined: float = 0.0
    refused: int = -1

    @property
    def is_settled(self) -> bool:
        """It serves what it was told of, or never will."""
        return self.version >= self.announced or self.refused >= self.announced

    def is_coming(self, now: float, first_s: float) -> bool:
        """Will it serve what it was told of in a moment? Args: first_s: that it took the first to do so."""
        within_s = LATE * first_s + LATE_S
        return (
            not self.is_settled
            and self.standing == "working"
            and max(self.update_s, now - self.announced_at) <= within_s
        )

    def serves(self, version: int, now: float) -> None:
        if self.version < self.announced <= version:
            self.update_s = now - self.announced_at
        self.version = max(self.version, version)

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def role(self) -> Role:
        return self.hello.role

    @property
    def tokens_per_s(self) -> float:
        return self.speed.tokens_per_s

    def rejoin(self, hello: Hello, now: float) -> None:
        """It had taken the broker for lost, or been lost itself: it keeps its leases, and its credits count anew."""
        self.hello, self.joined = hello, now
        self.credits = self.leases_sent = 0

    def take_heartbeat(self, beat: Heartbeat, now: float) -> None:
        self.speed.take(beat, now)
        self.beat = beat


class Peers:
    """The table of connected peers."""

    def __init__(self, timeout_s: float, heartbeat_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._missed_s = MISSED_HEARTBEATS * heartbeat_s
        self._peers: dict[str, Peer] = {}
        self._by_role: dict[Role, list[Peer]] | None = None

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, name: str) -> Peer | None:
        return self._peers.get(name)

    def workers(self) -> Sequence[Peer]:
        """As they are now; who comes or goes later does not change what was returned."""
        return self._of_role("worker")

    @property
    def learner(self) -> Peer | None:
        return next(iter(self._of_role("learner")), None)

    def _of_role(self, role: Role) -> Sequence[Peer]:
        """Reckoned when somebody has come or gone: of thousands, nobody could look at all every turn."""
        if self._by_role is None:
            self._by_role = {"worker": [], "learner": [], "observer": []}
            for peer in self._peers.values():
                self._by_role[peer.role].append(peer)
        return self._by_role[role]

    def objection(self, sender: str, hello: Hello, run_id: str, newest: int) -> str:
        """Why this peer cannot be let in; "" if it can. Args: newest: version that a worker may serve at most."""
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this run {PROTOCOL}: use the same version of Echelon"
        if hello.run_id not in ("", run_id):
            return f"it belongs to run {hello.run_id}, this is {run_id}"
        if sender != hello.name or not sender:
            return f"connected as {sender!r} but calls itself {hello.name!r}"
        if hello.role == "worker" and hello.version > newest:
            return f"it serves version {hello.version}, the newest of this run is {newest}"
        known = self._peers.get(sender)
        if known is not None and not same_process(known.hello, hello) and is_alive(known.hello):
            return f"the name {sender!r} is taken by pid {known.hello.pid} on {known.hello.host}: choose another"
        learner = self.learner
        if hello.role == "learner" and learner is not None and learner.name != sender:
            return f"the run has a learner already: {learner.name}"
        return ""

    def add(self, hello: Hello, route: bytes) -> Peer:
        now = self._clock()
        peer = Peer(hello=hello, route=route, heard=now, version=hello.version, announced=hello.version, joined=now)
        peer.standing = "spare" if hello.spare else "working"
        self._peers[hello.name] = peer
        self._by_role = None
        return peer

    def remove(self, name: str) -> Peer | None:
        self._by_role = None
        return self._peers.pop(name, None)

    def silent(self, now: float) -> list[Peer]:
        """Peers that have not been heard for too long; of a role that is known to have ended, for long enough."""
        return [
            peer
            for peer in self
            if now - peer.heard > self._timeout_s
            or (peer.role != "observer" and now - peer.heard > self._missed_s and not is_alive(peer.hello))
        ]

    def worker_statuses(self, leased: dict[str, int], now: float) -> tuple[WorkerStatus, ...]:
        """Args: leased: groups each worker holds."""
        return tuple(
            WorkerStatus(
                name=peer.name,
                version=peer.version,
                leased_groups=leased.get(peer.name, 0),
                running_sequences=peer.beat.running_sequences,
                tokens_per_s=peer.tokens_per_s,
                silent_s=now - peer.heard,
                standing=peer.standing,
                joined_s=now - peer.joined,
            )
            for peer in self.workers()
        )


def may_send(role: Role, message: ToBroker) -> bool:
    return isinstance(message, MAY_SEND[role])


def same_process(one: Hello, other: Hello) -> bool:
    return (one.pid, one.host, one.role) == (other.pid, other.host, other.role)


def is_alive(hello: Hello) -> bool:
    """False only where we can know that the peer's process has ended: on this host."""
    if hello.host != socket.gethostname() or hello.pid <= 0:
        return True
    try:
        os.kill(hello.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
