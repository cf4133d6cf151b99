"""The two ends of the bus: one ROUTER at the broker, one DEALER at each peer.

A message on the wire is a msgpack header and its column frames; the ROUTER puts the sender's route in front: its
name and a tag that no other connection has. So a second peer under a taken name can be told so, and cannot push the
first one out.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from databus.address import check_address
from databus.codec import Frame, MalformedMessage, decode_header, encode_header
from databus.curve import Doorkeeper, role_of, use_client_keys, use_server_keys
from databus.keys import ClientKeys, ServerKeys
from databus.messages import Hello, OneToWorker, Role, Several, ToBroker

logger = logging.getLogger(__name__)

Said = tuple[msgspec.Struct, Sequence[Frame]]
"""A message and its column frames."""

MAX_FRAMES = 4096
MAX_NAME_BYTES = 200
ROUTE_TAG = "#"
LINGER_MS = 2000
HANDSHAKE_MS = 10_000
"""A connection that has not shown a key by then is closed, so that strangers hold nothing for long."""
SEND_QUEUE = 100_000
"""Messages that may wait for a slow peer; credits and heartbeats keep queues far below."""


class Received(NamedTuple):
    """A message that arrived at the broker, or what was wrong with it.

    route: of the connection it came by. role: of the key that the connection has; None where there are no keys.
    """

    peer: str
    message: ToBroker | MalformedMessage
    frames: Sequence[Frame]
    route: bytes
    role: Role | None = None


def make_socket(
    context: zmq.Context, kind: int, max_message_bytes: int, keys: ServerKeys | ClientKeys | None = None
) -> zmq.Socket:
    """The options that every socket of the bus has. Args: keys: None for plain text."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if isinstance(keys, ServerKeys):
        use_server_keys(socket, keys)
    elif keys is not None:
        use_client_keys(socket, keys)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    return socket


def is_ipv6(address: str) -> bool:
    """zmq wants to be told; told so of an IPv4 address, it would call it by another name."""
    return address.startswith("tcp://[")


def new_route(name: str) -> bytes:
    """A route for one connection of the peer `name`. Raises: ValueError for a name that cannot be one."""
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES or ROUTE_TAG in name:
        raise ValueError(f"{name!r} cannot be a peer's name: 1 to {MAX_NAME_BYTES} bytes without {ROUTE_TAG!r}")
    return f"{name}{ROUTE_TAG}{os.urandom(8).hex()}".encode()


class BrokerSocket:
    """The broker's ROUTER. Single-threaded."""

    def __init__(self, address: str, max_message_bytes: int, keys: ServerKeys | None = None) -> None:
        """Raises: ValueError, one line, for an address that the bus may not use or that is taken."""
        check_address(address, encrypted=keys is not None)
        self._context = zmq.Context()
        self._doorkeeper = None if keys is None else Doorkeeper(self._context, keys.allowed)
        self._socket = make_socket(self._context, zmq.ROUTER, max_message_bytes, keys)
        # Without this a message for a peer that is gone vanishes silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that reconnects takes its old connection's place.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._decoder = msgspec.msgpack.Decoder(ToBroker)
        self._routes: dict[str, bytes] = {}
        self.address = ""
        self._socket.setsockopt(zmq.IPV6, is_ipv6(address))
        try:
            _refuse_taken_ipc(address)
            self._socket.bind(address)
            _keep_for_owner(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"cannot listen on bus.address={address}: {error.strerror}; choose another, or leave it at auto"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> Received | None:
        """The next message; None if none came in time. A malformed one is returned as what is wrong with it."""
        parts = self._next_parts()
        if parts is None and timeout_s > 0 and self._socket.poll(int(timeout_s * 1000)):
            parts = self._next_parts()
        if parts is None:
            return None
        identity, *frames = parts
        route = bytes(identity.buffer)
        peer = route.decode(errors="replace").partition(ROUTE_TAG)[0]
        role = None if self._doorkeeper is None else role_of(identity)
        if not 1 <= len(frames) <= MAX_FRAMES:
            return Received(peer, MalformedMessage(f"a message of {len(frames)} frames"), (), route, role)
        try:
            message = decode_header(frames[0].buffer, self._decoder)
        except MalformedMessage as error:
            return Received(peer, error, (), route, role)
        if isinstance(message, Hello):
            self._routes.setdefault(peer, route)  # a free seat is taken by whoever asks first
        return Received(peer, message, [frame.buffer for frame in frames[1:]], route, role)

    def _next_parts(self) -> list[zmq.Frame] | None:
        try:
            parts = [self._socket.recv(zmq.DONTWAIT, copy=False)]
        except zmq.Again:
            return None
        while parts[-1].more:  # `recv_multipart` asks the socket after each part, which takes longer than to receive it
            parts.append(self._socket.recv(copy=False))
        return parts

    def seat(self, peer: str, route: bytes) -> None:
        """From now on the peer of this name is reached by this route."""
        self._routes[peer] = route

    def has_seat(self, peer: str) -> bool:
        return peer in self._routes

    def forget(self, peer: str) -> None:
        self._routes.pop(peer, None)

    def send(self, peer: str, message: msgspec.Struct, frames: Sequence[Frame] = ()) -> bool:
        """False if the peer has no seat, is gone, or takes nothing any more."""
        route = self._routes.get(peer)
        return route is not None and self.answer(route, message, frames)

    def send_all(self, peer: str, all_said: Sequence[Said]) -> None:
        """As `send` each of them, in their order; those to a worker as one message: it costs what one of them would."""
        together: list[tuple[OneToWorker, Sequence[Frame]]] = []
        for message, frames in all_said:
            if isinstance(message, OneToWorker):
                together.append((message, frames))
            else:
                self.send(peer, message, frames)
        if len(together) == 1:
            self.send(peer, *together[0])
        elif together:
            several = Several(
                messages=tuple(message for message, _ in together),
                num_frames=tuple(len(frames) for _, frames in together),
            )
            self.send(peer, several, [frame for _, frames in together for frame in frames])

    def answer(self, route: bytes, message: msgspec.Struct, frames: Sequence[Frame] = ()) -> bool:
        """Send to whoever is behind a route, seated or not. False if nobody is, or takes nothing any more."""
        try:
            parts = [route, encode_header(message), *map(_as_received, frames)]
            self._socket.send_multipart(parts, flags=zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        if self.address.startswith("ipc://"):  # zmq leaves it
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()


def _as_received(frame: Frame) -> Frame | zmq.Frame:
    """The message that a frame is all of, if it came from a socket: libzmq counts who still needs it, whereas for other
    memory pyzmq has a thread of Python's that wakes up for each frame that has left."""
    if not isinstance(frame, memoryview):
        return frame
    whole: object = frame.obj
    return whole if isinstance(whole, zmq.Frame) and len(whole) == frame.nbytes else frame


def _keep_for_owner(address: str) -> None:
    """There are no keys on ipc: whoever may write to the file may connect, by default the owner's group, too."""
    if address.startswith("ipc://"):
        os.chmod(address.removeprefix("ipc://"), 0o600)


def _refuse_taken_ipc(address: str) -> None:
    """zmq takes an ipc path over from whoever listens there; another broker must keep it."""
    if not address.startswith("ipc://") or not Path(address.removeprefix("ipc://")).exists():
        return
    with zmq.Context() as context, context.socket(zmq.DEALER) as probe:
        probe.setsockopt(zmq.LINGER, 0)
        monitor = probe.get_monitor_socket(zmq.EVENT_CONNECTED)
        probe.connect(address)
        taken = bool(monitor.poll(200))
        probe.disable_monitor()
    if taken:
        raise zmq.ZMQError(zmq.EADDRINUSE)
