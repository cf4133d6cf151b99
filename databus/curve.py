"""CURVE on the bus's sockets, and the check of who connects (ZAP, rfc.zeromq.org/spec/27).

CURVE alone encrypts for anybody: who may connect is for the ZAP handler to say. Its answer names the role of the key,
and comes with every message of the connection.
"""

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress

import zmq
from zmq.utils import z85

from databus.keys import ClientKeys, ServerKeys
from databus.messages import Role

logger = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
ZAP_FRAMES = 7
DOMAIN = b"echelon"
POLL_MS = 100
STOP_TIMEOUT_S = 5.0


def use_server_keys(socket: zmq.Socket, keys: ServerKeys) -> None:
    """Let nobody in without an answer from the context's `Doorkeeper`; call it before `bind`."""
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # libzmq 4.3 lets all keys in where no handler answers, without this
    socket.curve_server = True
    socket.curve_publickey = keys.own.public
    socket.curve_secretkey = keys.own.secret


def use_client_keys(socket: zmq.Socket, keys: ClientKeys) -> None:
    """Call it before `connect`."""
    socket.curve_serverkey = keys.server
    socket.curve_publickey = keys.own.public
    socket.curve_secretkey = keys.own.secret


def role_of(frame: zmq.Frame) -> Role:
    """The role of the key that a message came with."""
    role = frame.get("User-Id")
    assert role in ("worker", "learner", "observer")
    return role


class Doorkeeper:
    """Answers every handshake of a context's server sockets, in a thread of its own: is this one of the run's keys?"""

    def __init__(self, context: zmq.Context, allowed: Mapping[bytes, Role]) -> None:
        """Args: allowed: role by public key, Z85. Make it before the first socket of the context listens."""
        self.refused = 0
        self._roles = {z85.decode(key): role for key, role in allowed.items()}
        self._stop = threading.Event()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ZAP_ADDRESS)
        self._thread = threading.Thread(target=self._serve, name="doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(STOP_TIMEOUT_S)

    def _serve(self) -> None:
        with suppress(zmq.ContextTerminated):
            while not self._stop.is_set():
                if self._socket.poll(POLL_MS):
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        self._socket.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """[version, request id, domain, address, identity, mechanism, key] -> the same with a verdict."""
        role = self._roles.get(request[6]) if len(request) == ZAP_FRAMES and request[5] == b"CURVE" else None
        if role is None:
            self._count_refused(_text(request[3:4]))
            return [ZAP_VERSION, *request[1:2], b"400", b"unknown key", b"", b""]
        return [ZAP_VERSION, request[1], b"200", b"", role.encode(), b""]

    def _count_refused(self, address: str) -> None:
        """A stranger tries again many times a second, which is not to fill the log."""
        self.refused += 1
        if self.refused.bit_count() == 1:
            logger.warning("refused a connection from %s without a key of this run (%d so far)", address, self.refused)


def _text(frames: list[bytes]) -> str:
    return b" ".join(frames).decode(errors="replace")
