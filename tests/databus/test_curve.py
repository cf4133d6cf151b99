"""Who gets in: the run's keys, each as what it is, and nobody else."""

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from scripted import RunningBroker, ScriptedLearner, ScriptedWorker, broker_config, connect, receive

from databus import transport
from databus.client import BusClient
from databus.codec import encode_header
from databus.errors import BusRefused, BusTimeout
from databus.keys import ClientKeys, KeyPair, client_keys, new_keys, server_keys
from databus.messages import BatchRequest, Hello, Refused, Role, StatusRequest
from databus.transport import BrokerSocket, make_socket

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "keys"
    new_keys(folder)
    return folder


@pytest.fixture
def broker(keys: Path) -> Iterator[BrokerSocket]:
    """A bare socket: what it receives got past the door."""
    socket = BrokerSocket("tcp://127.0.0.1:*", LIMIT, server_keys(keys, "broker"))
    yield socket
    socket.close()


def stranger(keys: Path) -> ClientKeys:
    public, secret = zmq.curve_keypair()
    return ClientKeys(KeyPair(public, secret), client_keys(keys, "worker").server)


def say_hello(address: str, keys: ClientKeys | None, role: Role = "worker") -> BusTimeout:
    with pytest.raises(BusTimeout) as caught:
        BusClient(address, Hello(role=role, name="w"), keys=keys).connect(0.8)
    return caught.value


def test_a_run_with_keys(keys: Path) -> None:
    running = RunningBroker(broker_config("tcp://127.0.0.1:*"), keys=server_keys(keys, "broker"))
    address = running.broker.address
    worker = ScriptedWorker(address, keys=client_keys(keys, "worker"))
    learner = ScriptedLearner(address, keys=client_keys(keys, "learner"))
    for step in range(3):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join()
    assert running.failure is None
    assert [row["step"] for row in running.sink.rows] == [0, 1, 2]


def test_unknown_key_gets_nothing(broker: BrokerSocket, keys: Path) -> None:
    assert "or it wants another key" in str(say_hello(broker.address, stranger(keys)))
    assert broker.receive(0.3) is None


def test_plain_text_gets_nothing(broker: BrokerSocket) -> None:
    say_hello(broker.address, None)
    assert broker.receive(0.3) is None


def test_key_of_another_run_gets_nothing(broker: BrokerSocket, keys: Path, tmp_path: Path) -> None:
    new_keys(tmp_path / "other")
    other = client_keys(tmp_path / "other", "worker")
    say_hello(broker.address, other)  # expects another broker
    say_hello(broker.address, ClientKeys(other.own, client_keys(keys, "worker").server))
    assert broker.receive(0.3) is None


def test_peer_with_keys_does_not_talk_to_a_broker_without(keys: Path) -> None:
    plain = BrokerSocket("tcp://127.0.0.1:*", LIMIT)
    say_hello(plain.address, client_keys(keys, "worker"))
    assert plain.receive(0.3) is None
    plain.close()


def test_every_message_has_the_role_of_its_key(broker: BrokerSocket, keys: Path) -> None:
    with zmq.Context() as context:
        for role in ("worker", "learner", "observer"):
            peer = make_socket(context, zmq.DEALER, LIMIT, client_keys(keys, role))
            peer.connect(broker.address)
            peer.send_multipart([encode_header(StatusRequest())])
            received = broker.receive(5.0)
            assert received is not None and received.role == role
            peer.send_multipart([b"\xff"])
            received = broker.receive(5.0)
            assert received is not None and received.role == role
            peer.close(linger=0)


@pytest.mark.parametrize(
    ("held", "claimed"), [("worker", "learner"), ("observer", "worker"), ("worker", "observer"), ("learner", "worker")]
)
def test_hello_of_another_role_than_the_keys_is_refused(keys: Path, held: Role, claimed: Role) -> None:
    running = RunningBroker(broker_config("tcp://127.0.0.1:*"), keys=server_keys(keys, "broker"))
    with pytest.raises(BusRefused, match=f"its key is of role {held}, and it calls itself {claimed}"):
        connect(running.broker.address, "x", claimed, keys=client_keys(keys, held))


def test_message_of_another_role_is_refused_on_an_open_connection(keys: Path) -> None:
    running = RunningBroker(broker_config("tcp://127.0.0.1:*"), keys=server_keys(keys, "broker"))
    worker = connect(running.broker.address, "w", "worker", keys=client_keys(keys, "worker"))
    worker.send(BatchRequest(step=0))
    assert "a worker may not send BatchRequest" in receive(worker, Refused).reason
    worker.close("done")


def test_stolen_route_is_of_no_use_with_another_key(keys: Path) -> None:
    """A later connection may take over a route on the ROUTER: its key, not the route, says what it may send."""
    running = RunningBroker(broker_config("tcp://127.0.0.1:*", steps=1), keys=server_keys(keys, "broker"))
    address = running.broker.address
    learner = ScriptedLearner(address, keys=client_keys(keys, "learner"))
    route = running.broker._state.peers.learner.route  # type: ignore[union-attr]
    with zmq.Context() as context:
        thief = make_socket(context, zmq.DEALER, LIMIT, client_keys(keys, "worker"))
        thief.setsockopt(zmq.IDENTITY, route)
        thief.connect(address)
        thief.send_multipart([encode_header(BatchRequest(step=0))])
        assert thief.poll(5000)
        assert b"say hello first" in thief.recv_multipart()[0]
        thief.close(linger=0)
    assert running.broker._state.requested is None
    learner.client.close("done")


def test_handler_that_has_gone_lets_nobody_in(broker: BrokerSocket, keys: Path) -> None:
    assert broker._doorkeeper is not None
    broker._doorkeeper.close()
    say_hello(broker.address, client_keys(keys, "worker"))
    assert broker.receive(0.3) is None


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE"])
def test_connection_without_a_handshake_is_closed(keys: Path, monkeypatch: pytest.MonkeyPatch, greeting: bytes) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_MS", 500)
    broker = BrokerSocket("tcp://127.0.0.1:*", LIMIT, server_keys(keys, "broker"))
    host, port = broker.address.removeprefix("tcp://").split(":")
    started = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=5.0) as raw, suppress(ConnectionResetError):
        raw.sendall(greeting)
        while raw.recv(4096):  # what it says of itself, and then the end
            pass
    assert time.monotonic() - started < 4.0
    broker.close()
