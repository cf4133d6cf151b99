"""The weight server: workers pull policy versions from the learner, chunk by chunk."""

import logging
import shutil
import tempfile
import threading
from pathlib import Path

import msgspec
import zmq

from databus.codec import Frame, MalformedMessage, decode_header, encode_header
from databus.curve import Doorkeeper
from databus.keys import ServerKeys
from databus.messages import Chunk, ChunkRequest, FromWeightServer, ManifestRequest, ToWeightServer, VersionGone
from databus.transfers import NoTransfer, TransferRequest
from databus.transport import make_socket
from learner.kept_versions import KeptVersions
from learner.snapshot import Snapshot
from learner.transfers import Transfers

logger = logging.getLogger(__name__)

POLL_MS = 100
MAX_REQUEST_BYTES = 4096
MAX_UNREAD_ANSWERS = 64
"""More than a worker keeps asked for: one that asks and does not read holds no more than this of the snapshots."""
NONE_KEPT = -1


class WeightServer:
    """An `Outlet`: serves the newest versions from a thread with a ROUTER socket of its own; never blocks its caller.

    Requests that make no sense are ignored and counted, as are answers that a peer does not take.
    """

    def __init__(
        self, bus_address: str, keep: int, keys: ServerKeys | None = None, transfers: Transfers | None = None
    ) -> None:
        """Bind beside the bus: on the same host where the bus is on TCP, otherwise on ipc in a private folder.

        Args: keep: versions kept, at least 1. keys: None for plain text. transfers: another way for whole versions,
            which is closed with this; None: there is none.
        Raises: zmq.ZMQError if nothing can be bound.
        """
        self.keeps_data = True
        self.malformed_requests = 0
        self.undelivered_answers = 0
        self._versions = KeptVersions(keep)
        self._transfers = transfers
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._folder: Path | None = None
        self._context = zmq.Context()
        self._doorkeeper = None if keys is None else Doorkeeper(self._context, keys.allowed)
        self._socket = make_socket(self._context, zmq.ROUTER, MAX_REQUEST_BYTES, keys)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_ANSWERS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.address = ("" if transfers is None else transfers.scheme) + self._bind(bus_address)
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def publish(self, snapshot: Snapshot) -> None:
        """Serve one more version from now on; the oldest beyond `keep` is forgotten."""
        if self._transfers is not None:
            self._transfers.stage(snapshot)
        with self._lock:
            self._versions.add(snapshot)

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop serving within `timeout_s` and remove what was created. Harmless when called again."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the weight server did not stop within %.0f s", timeout_s)
        if self._transfers is not None:
            self._transfers.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bind(self, bus_address: str) -> str:
        if bus_address.startswith("tcp://"):
            host = bus_address.removeprefix("tcp://").rsplit(":", 1)[0]
            self._socket.setsockopt(zmq.IPV6, int(host.startswith("[")))
            self._socket.bind(f"tcp://{host}:*")
            return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._folder = Path(tempfile.mkdtemp(prefix="echelon-weights-"))  # mode 0700
        address = f"ipc://{self._folder / 'socket'}"
        self._socket.bind(address)
        return address

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                if self._socket.poll(POLL_MS):
                    self._answer(self._socket.recv_multipart())
                if self._transfers is not None:
                    self._transfers.tick()
        finally:
            # Sockets belong to one thread: this one closes it, and waits for no peer (LINGER 0).
            self._socket.close(linger=0)
            if self._doorkeeper is not None:
                self._doorkeeper.close()
            self._context.term()

    def _answer(self, frames: list[bytes]) -> None:
        peer, *parts = frames
        try:
            if len(parts) != 1:
                raise MalformedMessage(f"{len(parts)} frames, expected 1")
            request = decode_header(parts[0], _decoder)
        except MalformedMessage as error:
            self.malformed_requests += 1
            logger.debug("request ignored: %s", error)
            return
        self._send(peer, *self._reply(request))

    def _reply(self, request: ToWeightServer) -> tuple[FromWeightServer | None, Frame | None]:
        if isinstance(request, TransferRequest):
            return self._offer(request.version), None
        with self._lock:
            newest = self._versions.newest
            manifest = self._versions.manifest(request.version)
            snapshot = self._versions.get(request.version)
        match request:
            case ManifestRequest() if manifest is not None:
                return manifest, None
            case ChunkRequest(index=index, delta=delta) if snapshot is not None:
                data = snapshot.delta_chunk(index) if delta else snapshot.chunk(index)
                return (None, None) if data is None else (_chunk(request), data)
        return VersionGone(version=request.version, newest=NONE_KEPT if newest is None else newest), None

    def _offer(self, version: int) -> FromWeightServer:
        if self._transfers is None:
            return NoTransfer(version=version, reason="the learner has no other way than the bus")
        return self._transfers.offer(version)

    def _send(self, peer: bytes, reply: FromWeightServer | None, data: Frame | None) -> None:
        if reply is None:
            self.malformed_requests += 1
            return
        frames = [peer, encode_header(reply)] + ([data] if data is not None else [])
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:  # the peer has gone, or takes nothing: it will ask again
            self.undelivered_answers += 1
            logger.debug("answer to %r not delivered: %s", peer, error)


def _chunk(request: ChunkRequest) -> Chunk:
    return Chunk(version=request.version, index=request.index, delta=request.delta)


_decoder = msgspec.msgpack.Decoder(ToWeightServer)
