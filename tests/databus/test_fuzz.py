"""A live broker under 100,000 malformed messages: it answers, serves others meanwhile, its memory stays flat."""

import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import msgspec
import psutil
import pytest
import zmq
from broker_process import broker_process
from malformed import Malformed
from scripted import ScriptedLearner, ScriptedWorker, broker_config

from databus.client import Arrived
from databus.config import BrokerConfig, BusConfig
from databus.messages import Ack, Hello, Refused, Several, Stop, ToObserver, ToWorker, VersionAnnounced, Welcome
from databus.transport import make_socket, new_route

pytestmark = [pytest.mark.slow, pytest.mark.timeout(100)]

MESSAGES = 100_000
VOLLEY = 50
"""Messages that an attacker sends before it looks at the answers."""
WARM_UP = 20_000
MAX_GROWTH_BYTES = 16 << 20
LIMIT = 2 << 20
MAX_ANSWER_BYTES = 2000
ANSWER_S = 20.0
decoder = msgspec.msgpack.Decoder(ToWorker | ToObserver)


class Attacker:
    """A connection that sends what it likes. role: None never says hello."""

    def __init__(self, context: zmq.Context, address: str, name: str, role: str | None, messages: Malformed) -> None:
        self._socket = make_socket(context, zmq.DEALER, 1 << 28)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, new_route(name))
        self._socket.connect(address)
        self._messages = messages
        self._sent = 0
        self._answers: deque[object] = deque()
        if role is not None:
            hello = Hello(role=role, name=name)  # type: ignore[arg-type]
            self._socket.send(msgspec.msgpack.encode(hello))
            assert isinstance(self._answer(), Welcome)

    def volley(self) -> int:
        """Send some messages; every one that must be answered has been on return. Returns: how many were sent."""
        owed = 0
        for _ in range(VOLLEY):
            frames, must_be_answered = self._messages.draw()
            owed += must_be_answered
            self._socket.send_multipart(frames)
        marker = f"marker-{self._sent}"
        self._socket.send(msgspec.msgpack.encode({"type": marker}))
        self._sent += VOLLEY
        answers, is_through = 0, False
        while not is_through or answers < owed:  # acknowledgements wait for the journal, so they may come last
            if self._is_answer_to(marker):
                is_through = True
            else:
                answers += 1
        return VOLLEY

    def oversized(self) -> None:
        """zmq drops the connection before the broker sees anything."""
        self._socket.send(b"x" * (LIMIT + 1))

    def close(self) -> None:
        self._socket.close(linger=0)

    def _is_answer_to(self, marker: str) -> bool:
        answer = self._answer()
        return isinstance(answer, Refused) and marker in answer.reason

    def _answer(self) -> object:
        while not self._answers:
            assert self._socket.poll(ANSWER_S * 1000), f"no answer within {ANSWER_S} s"
            header, *_ = self._socket.recv_multipart()
            message = decoder.decode(header)
            together = message.messages if isinstance(message, Several) else (message,)
            assert len(header) <= MAX_ANSWER_BYTES * len(together), "what is refused is not sent back whole"
            self._answers += [each for each in together if not isinstance(each, VersionAnnounced)]
        return self._answers.popleft()


class GoodPeers:
    """A worker and a learner that do as they should, all the while."""

    def __init__(self, address: str) -> None:
        self._worker = ScriptedWorker(address)
        self._learner = ScriptedLearner(address)
        self._stop = False
        self.steps = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop:
            self._learner.step(self.steps)
            self.steps += 1
            time.sleep(0.02)

    def makes_steps(self, number: int, within_s: float) -> bool:
        goal, deadline = self.steps + number, time.monotonic() + within_s
        while self.steps < goal and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        return self.steps >= goal

    def close(self) -> None:
        self._stop = True
        self._thread.join(10.0)
        self._worker.client._put(Arrived(Stop(reason="the test is over"), ()))
        self._worker.join()
        self._learner.client.close("done")


@contextmanager
def under_attack(config: BrokerConfig, log: Path) -> Iterator[tuple[psutil.Process, GoodPeers, zmq.Context]]:
    with broker_process(config, log) as broker, zmq.Context() as context:
        good = GoodPeers(config.address)
        try:
            yield broker, good, context
        finally:
            good.close()


@pytest.fixture
def config(address: str) -> BrokerConfig:
    bus = BusConfig(heartbeat_s=0.5, peer_timeout_s=30.0, lease_s=30.0, max_message_bytes=LIMIT)
    return broker_config(address, steps=10**6, max_staleness=4, bus=bus)


def test_malformed_messages(config: BrokerConfig, tmp_path: Path) -> None:
    seed = Random().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201  shown where the test fails
    messages = Malformed(seed)
    with under_attack(config, tmp_path / "log") as (broker, good, context):
        attackers = [
            Attacker(context, config.address, f"attacker-{index}", role, messages)
            for index, role in enumerate([None, None, "worker", "worker", "observer"])
        ]
        sent, warm, steps_before = 0, 0, good.steps
        while sent < MESSAGES:
            for attacker in attackers:
                sent += attacker.volley()
            if not warm and sent >= WARM_UP:
                warm = broker.memory_info().rss
        grown = broker.memory_info().rss - warm
        steps_meanwhile = good.steps - steps_before
        for attacker in attackers:
            attacker.close()
        assert good.makes_steps(5, within_s=10.0), "the others are not served any more"
    assert steps_meanwhile >= 50, f"the others made only {steps_meanwhile} steps meanwhile"
    assert grown <= MAX_GROWTH_BYTES, f"the broker grew by {grown >> 20} MiB over {sent - WARM_UP} messages"


def test_oversized_messages_cost_their_sender_the_connection(config: BrokerConfig, tmp_path: Path) -> None:
    with under_attack(config, tmp_path / "log") as (broker, good, context):
        assert good.makes_steps(2, within_s=10.0)
        before = broker.memory_info().rss
        for index in range(50):
            attacker = Attacker(context, config.address, f"attacker-{index}", None, Malformed(index))
            attacker.oversized()
            attacker.close()
        assert good.makes_steps(20, within_s=20.0)
        assert broker.memory_info().rss - before <= MAX_GROWTH_BYTES


def test_connections_that_speak_something_else(config: BrokerConfig, tmp_path: Path) -> None:
    """Half a handshake, noise, another protocol; some stay open and say nothing."""
    random = Random(1)
    path = config.address.removeprefix("ipc://")
    with under_attack(config, tmp_path / "log") as (broker, good, _):
        assert good.makes_steps(2, within_s=10.0)
        before, idle = broker.memory_info().rss, []
        for index in range(300):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            junk = [
                b"GET / HTTP/1.1\r\n\r\n",
                random.randbytes(300),
                b"\xff\0\0\0\0\0\0\0\1\x7f\3",
                b"\xff" + b"\0" * 63,
            ]
            connection.sendall(junk[index % len(junk)])
            if index % 10:
                connection.close()
            else:
                idle.append(connection)
        assert good.makes_steps(20, within_s=20.0)
        assert broker.memory_info().rss - before <= MAX_GROWTH_BYTES
        for connection in idle:
            connection.close()


def test_what_one_group_of_nobody_is_answered(config: BrokerConfig, tmp_path: Path) -> None:
    """The answers that the fuzz counts are what they should be."""
    with under_attack(config, tmp_path / "log") as (_, _, context):
        attacker = Attacker(context, config.address, "attacker", "worker", Malformed(0))
        for draw, kind in [("group_of_nobody", Ack), ("values_out_of_range", Refused), ("noise", Refused)]:
            attacker._socket.send_multipart(getattr(attacker._messages, draw)())
            assert isinstance(attacker._answer(), kind), draw
        attacker.close()
