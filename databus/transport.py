"""The two ends of the bus: one ROUTER at the broker, one DEALER at each peer.

A message on the wire is a msgpack header and its column frames; the ROUTER puts the sender's name in front.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq

from databus.address import check_address
from databus.codec import Frame, MalformedMessage, decode_header, encode_header
from databus.messages import ToBroker

logger = logging.getLogger(__name__)

MAX_FRAMES = 4096
LINGER_MS = 2000
SEND_QUEUE = 100_000
"""Messages that may wait for a slow peer; credits and heartbeats keep queues far below."""


class Received(NamedTuple):
    """A message that arrived at the broker, or what was wrong with it."""

    peer: str
    message: ToBroker | MalformedMessage
    frames: Sequence[Frame]


def make_socket(context: zmq.Context, kind: int, max_message_bytes: int) -> zmq.Socket:
    """The options that every socket of the bus has; the place where keys will be set, too."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    return socket


class BrokerSocket:
    """The broker's ROUTER. Single-threaded."""

    def __init__(self, address: str, max_message_bytes: int) -> None:
        """Raises: ValueError, one line, for an address that the bus may not use or that is taken."""
        check_address(address)
        self._context = zmq.Context()
        self._socket = make_socket(self._context, zmq.ROUTER, max_message_bytes)
        # Without this a message for a peer that is gone vanishes silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A peer that reconnects under its name takes its old connection's place.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._decoder = msgspec.msgpack.Decoder(ToBroker)
        try:
            _refuse_taken_ipc(address)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"cannot listen on bus.address={address}: {error.strerror}; choose another, or leave it at auto"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> Received | None:
        """The next message; None if none came in time. A malformed one is returned as what is wrong with it."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        identity, *frames = self._socket.recv_multipart(copy=False)
        peer = bytes(identity.buffer).decode(errors="replace")
        if not 1 <= len(frames) <= MAX_FRAMES:
            return Received(peer, MalformedMessage(f"a message of {len(frames)} frames"), ())
        try:
            message = decode_header(frames[0].buffer, self._decoder)
        except MalformedMessage as error:
            return Received(peer, error, ())
        return Received(peer, message, [frame.buffer for frame in frames[1:]])

    def send(self, peer: str, message: msgspec.Struct, frames: Sequence[Frame] = ()) -> bool:
        """False if the peer is gone or takes nothing any more."""
        try:
            self._socket.send_multipart(
                [peer.encode(), encode_header(message), *frames], flags=zmq.DONTWAIT, copy=False
            )
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()


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
