"""A proxy between the peers of a run and its broker that loses, doubles, delays and reorders messages.

Every peer keeps its route: towards the broker it has a socket of its own, under the peer's identity. So both ends see
what they would see without it, but for the faults.
"""

import heapq
import itertools
import threading
import time
from collections import Counter
from dataclasses import dataclass
from random import Random

import zmq

SEND_QUEUE = 100_000


@dataclass(frozen=True)
class Rates:
    """Shares of messages. A message that is held back is overtaken by all that come meanwhile."""

    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    longest_delay_s: float = 0.5


class Proxy:
    """In a thread of its own, from construction to `close`. `counts` says what it has done."""

    def __init__(self, listen: str, broker: str, seed: int, rates: Rates) -> None:
        self.counts: Counter[str] = Counter()
        self._broker = broker
        self._random = Random(seed)
        self._rates = rates
        self._cut = threading.Event()
        self._stop = threading.Event()
        self._held: list[tuple[float, int, bytes, bool, list[bytes]]] = []
        self._order = itertools.count()
        self._context = zmq.Context()
        self._front = self._make(zmq.ROUTER)
        self._front.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._front.bind(listen)
        self._backs: dict[bytes, zmq.Socket] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Cut every connection to the broker; what is under way on them is lost."""
        self._cut.set()

    def calm(self) -> None:
        """No more faults."""
        self._rates = Rates()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)
        assert not self._thread.is_alive()

    # ------------------------------------------------------------ its thread

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            self._context.destroy(linger=0)

    def _turn(self) -> None:
        poller = zmq.Poller()
        for socket in (self._front, *self._backs.values()):
            poller.register(socket, zmq.POLLIN)
        ready = dict(poller.poll(20))
        if self._front in ready:
            route, *frames = self._front.recv_multipart()
            self._pass(route, True, frames)
        for route, back in list(self._backs.items()):
            if back in ready:
                self._pass(route, False, back.recv_multipart())
        while self._held and self._held[0][0] <= time.monotonic():
            _, _, route, inwards, frames = heapq.heappop(self._held)
            self._send(route, inwards, frames)
        if self._cut.is_set():
            self._cut.clear()
            self._cut_all()

    def _pass(self, route: bytes, inwards: bool, frames: list[bytes]) -> None:
        self.counts["messages"] += 1
        rates, draw = self._rates, self._random.random()
        if draw < rates.drop:
            self.counts["dropped"] += 1
        elif draw < rates.drop + rates.double:
            self.counts["doubled"] += 1
            self._send(route, inwards, frames)
            self._send(route, inwards, frames)
        elif draw < rates.drop + rates.double + rates.delay:
            self.counts["delayed"] += 1
            due = time.monotonic() + self._random.uniform(0, rates.longest_delay_s)
            heapq.heappush(self._held, (due, next(self._order), route, inwards, frames))
        else:
            self._send(route, inwards, frames)

    def _send(self, route: bytes, inwards: bool, frames: list[bytes]) -> None:
        if inwards:
            self._back(route).send_multipart(frames)
        else:
            self._front.send_multipart([route, *frames])

    def _back(self, route: bytes) -> zmq.Socket:
        if route not in self._backs:
            socket = self._make(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, route)
            socket.connect(self._broker)
            self._backs[route] = socket
        return self._backs[route]

    def _cut_all(self) -> None:
        self.counts["cut"] += len(self._backs)
        for back in self._backs.values():
            back.close(linger=0)
        self._backs.clear()

    def _make(self, kind: int) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
        return socket
