"""Sockets, names, deadlines: the bus without a broker's logic."""

import os
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from databus.address import check_address, reachable, resolve_address
from databus.client import BusClient, apart
from databus.codec import MalformedMessage
from databus.errors import BusLost, BusTimeout
from databus.messages import (
    Ack,
    Credits,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Lease,
    Sampling,
    Several,
    Stop,
    Welcome,
)
from databus.transport import BrokerSocket

LIMIT = 1 << 20


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:5555", "tcp://10.0.0.1:5555", "tcp://example.org:1", "udp://127.0.0.1:1", "ipc://", "x"]
)
def test_addresses_beyond_this_machine_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        check_address(address)
    with pytest.raises(ValueError, match="not allowed"):
        BrokerSocket(address, LIMIT)


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:5555", "tcp://*:*", "tcp://10.0.0.1:5555", "tcp://example.org:1", "tcp://[2001:db8::1]:1"],
)
def test_with_keys_any_host_will_do(address: str) -> None:
    assert check_address(address, encrypted=True) == address


@pytest.mark.parametrize(
    "address", ["udp://10.0.0.1:1", "ipc://", "x", "tcp://a b:1", "tcp://:1", "tcp://host", "tcp://h:1;h:2"]
)
def test_no_keys_make_an_address_of_anything(address: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        check_address(address, encrypted=True)


@pytest.mark.parametrize(
    ("address", "broker", "reached"),
    [
        ("tcp://0.0.0.0:7", "tcp://10.0.0.1:5", "tcp://10.0.0.1:7"),
        ("tcp://*:7", "tcp://node:5", "tcp://node:7"),
        ("tcp://0.0.0.0:7", "", "tcp://127.0.0.1:7"),
        ("tcp://[::]:7", "", "tcp://[::1]:7"),
        ("tcp://10.0.0.2:7", "tcp://10.0.0.1:5", "tcp://10.0.0.2:7"),
        ("ipc:///a", "tcp://10.0.0.1:5", "ipc:///a"),
    ],
)
def test_every_interface_is_reached_where_the_broker_is(address: str, broker: str, reached: str) -> None:
    assert reachable(address, broker) == reached


@pytest.mark.parametrize("port", ["0", "65536", "99999"])
def test_ports_that_zmq_would_wrap_are_refused(port: str) -> None:
    with pytest.raises(ValueError, match="a port is 1 to 65535"):
        check_address(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize("name", ["", "a#b", "x" * 201])
def test_names_that_cannot_be_routes_are_refused(name: str, address: str) -> None:
    with pytest.raises(ValueError, match="cannot be a peer's name"):
        BusClient(address, Hello(role="worker", name=name))


def test_auto_address_survives_a_long_folder(tmp_path: Path) -> None:
    assert resolve_address("auto", Path("/tmp/run")) == "ipc:///tmp/run/bus.sock"
    long = resolve_address("auto", tmp_path / ("x" * 120))
    assert len(long) < 108 and Path(long.removeprefix("ipc://")).parent.stat().st_mode & 0o777 == 0o700


def test_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"cannot listen on bus\.address=.*: Address already in use"):
            BrokerSocket(address, LIMIT)


def test_ipc_socket_of_a_living_broker_is_not_taken_over(address: str) -> None:
    broker = BrokerSocket(address, LIMIT)
    with pytest.raises(ValueError, match="Address already in use"):
        BrokerSocket(address, LIMIT)
    broker.close()
    BrokerSocket(address, LIMIT).close()  # what a dead one left behind is no obstacle


def test_ipc_socket_is_for_its_owner_alone(address: str) -> None:
    before = os.umask(0)
    try:
        broker = BrokerSocket(address, LIMIT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(address.removeprefix("ipc://")).st_mode) == 0o600
    broker.close()


def _listens_on_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_tcp_loopback_carries_messages(host: str) -> None:
    if host == "[::1]" and not _listens_on_ipv6():
        pytest.skip("no IPv6 on this machine")
    broker = BrokerSocket(f"tcp://{host}:*", LIMIT)
    assert broker.address.startswith("tcp://127.0.0.1:" if host == "localhost" else f"tcp://{host}:")
    client = _connected(broker, broker.address)
    client.send(Credits(total=3), [b"abc"])
    received = _next(broker, Credits)
    assert received.peer == "w" and bytes(received.frames[0]) == b"abc"
    client.close("done")
    assert _next(broker, Goodbye).message == Goodbye(reason="done")
    broker.close()


def test_what_a_worker_is_told_at_one_time_comes_in_its_order_with_its_frames(address: str) -> None:
    broker = BrokerSocket(address, LIMIT)
    client = _connected(broker, address)
    said = [(Ack(group_id="a", accepted=True), []), (_lease("b"), [b"1", b"2"]), (_lease("c"), [b"3"])]
    broker.send_all("w", [*said, (Stop(reason="done"), []), *said[:1]])
    arrived = [client.recv(2.0) for _ in range(5)]
    assert arrived[0] is not None and arrived[0].message == Stop(reason="done")  # it is for any peer, so it goes alone
    assert [(each.message, [bytes(frame) for frame in each.frames]) for each in arrived[1:] if each] == [
        *said,
        *said[:1],
    ]
    client.close()
    broker.close()


@pytest.mark.parametrize("num_frames", [(), (1,), (1, 2), (3, -1), (2, 0, 0)])
def test_frames_that_do_not_add_up(num_frames: tuple[int, ...]) -> None:
    together = Several(messages=(_lease("a"), _lease("b")), num_frames=num_frames)
    with pytest.raises(MalformedMessage, match="2 messages"):
        list(apart(together, [b"1", b"2"]))


def test_seats_and_routes(address: str) -> None:
    """Two connections of one name: each can be answered, one of them is the name's."""
    broker = BrokerSocket(address, LIMIT)
    first = _connected(broker, address)
    second = BusClient(address, Hello(role="worker", name="w", pid=2))
    connecting = threading.Thread(target=second.connect, args=(5.0,))
    connecting.start()
    route = _route_of_hello(broker, pid=2)
    broker.answer(route, Welcome(run_id="second", heartbeat_s=1, peer_timeout_s=5))
    connecting.join(5.0)
    broker.send("w", Stop(reason="to the first"))
    assert _stop(first) == "to the first"
    broker.seat("w", route)
    broker.send("w", Stop(reason="to the second"))
    assert _stop(second) == "to the second"
    broker.forget("w")
    assert not broker.send("w", Stop(reason="to nobody"))
    for client in (first, second):
        client.close()
    broker.close()


def _lease(group_id: str) -> Lease:
    return Lease(
        group_id=group_id,
        cursor=0,
        attempt=0,
        purpose="train",
        prompt="",
        prompt_ids=(1,),
        problem=b"{}",
        group_size=1,
        sampling=Sampling(max_tokens=1),
        lease_s=1.0,
    )


def _route_of_hello(broker: BrokerSocket, pid: int) -> bytes:
    while True:
        received = _next(broker, Hello)
        if isinstance(received.message, Hello) and received.message.pid == pid:
            return received.route


def _stop(client: BusClient) -> str:
    arrived = client.recv(2.0)
    assert arrived is not None and isinstance(arrived.message, Stop)
    return arrived.message.reason


def test_unknown_peer_is_reported_not_dropped(address: str) -> None:
    broker = BrokerSocket(address, LIMIT)
    assert not broker.send("nobody", Stop(reason="x"))
    broker.close()


def test_nobody_there_is_a_timeout(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(BusTimeout, match=r"no broker answered at ipc://.* within 0\.3 s"):
        BusClient(address, Hello(role="worker", name="w")).connect(0.3)
    assert time.monotonic() - started < 5


def test_silent_broker_is_lost_and_stays_lost(address: str) -> None:
    broker = BrokerSocket(address, LIMIT)
    client = _connected(broker, address, peer_timeout_s=0.4, reconnect_s=0.3)
    with pytest.raises(BusLost, match=r"nothing heard from the broker for 0\.[7-9] s"):
        client.recv(5.0)
    with pytest.raises(BusLost):
        client.recv(0.1)
    with pytest.raises(BusLost):
        client.send(Credits(total=1))
    client.close()
    broker.close()


def test_heartbeats_go_on_while_the_owner_computes(address: str) -> None:
    broker = BrokerSocket(address, LIMIT)
    client = _connected(broker, address, heartbeat_s=0.05)
    beats = 0
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        received = broker.receive(0.1)
        if received is not None and isinstance(received.message, Heartbeat):
            broker.send("w", HeartbeatReply(version=0))
            beats += 1
    assert beats >= 8
    client.close()
    broker.close()


def test_malformed_message_is_handed_over_as_such(address: str) -> None:
    import zmq

    broker = BrokerSocket(address, LIMIT)
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.connect(address)
        raw.send_multipart([b"\xff\xff\xff"])
        received = broker.receive(2.0)
        assert received is not None and isinstance(received.message, MalformedMessage)
        raw.send_multipart([b""] * 5000)
        received = broker.receive(2.0)
        assert received is not None and "5000 frames" in str(received.message)
    broker.close()


def test_round_trip_takes_no_polling_interval(address: str) -> None:
    """send() wakes the bus thread: a hundred round trips in a row take milliseconds, not a hundred timeouts."""
    broker = BrokerSocket(address, LIMIT)
    client = _connected(broker, address)
    started = time.monotonic()
    for total in range(100):
        client.send(Credits(total=total))
        _next(broker, Credits)
        broker.send("w", Stop(reason=str(total)))
        arrived = client.recv(1.0)
        assert arrived is not None and arrived.message == Stop(reason=str(total))
    assert time.monotonic() - started < 2.0
    client.close()
    broker.close()


def _next(broker: BrokerSocket, kind: type):
    """The next message of a kind; heartbeats and the like are passed over."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        received = broker.receive(0.2)
        if received is not None and isinstance(received.message, kind):
            return received
    raise AssertionError(f"no {kind.__name__}")


def _connected(broker: BrokerSocket, address: str, **welcome: float) -> BusClient:
    client = BusClient(address, Hello(role="worker", name="w"))
    connecting = threading.Thread(target=client.connect, args=(5.0,))
    connecting.start()
    _next(broker, Hello)
    broker.send("w", Welcome(**{"run_id": "r", "heartbeat_s": 0.1, "peer_timeout_s": 5.0} | welcome))
    connecting.join(5.0)
    assert not connecting.is_alive()
    return client
