"""Fetches a version from the learner's weight server, chunk by chunk, a few of them outstanding at any time."""

import contextlib
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from databus.address import check_address
from databus.codec import Frame, MalformedMessage, decode_header, encode_header
from databus.keys import ClientKeys
from databus.messages import Chunk, ChunkRequest, Delta, FromWeightServer, Manifest, ManifestRequest, VersionGone
from databus.transfers import CollectiveOffer, MappedOffer, NoTransfer, Offer, TransferRequest
from databus.transport import is_ipv6, make_socket
from rollout.weight_source import PullError, PullLimits, VersionGoneError

logger = logging.getLogger(__name__)

OUTSTANDING_CHUNKS = 8
MAX_MESSAGE_BYTES = 1 << 27
POLL_MS = 100

_decoder: "msgspec.msgpack.Decoder[FromWeightServer]" = msgspec.msgpack.Decoder(FromWeightServer)


@contextlib.contextmanager
def bus_source(
    address: str, stop: threading.Event, limits: PullLimits, keys: ClientKeys | None
) -> "Iterator[BusSource]":
    """As `open_source`."""
    context = zmq.Context()
    socket = make_socket(context, zmq.DEALER, MAX_MESSAGE_BYTES, keys)
    socket.setsockopt(zmq.IPV6, is_ipv6(address))
    try:
        socket.connect(check_address(address, encrypted=keys is not None))
        yield BusSource(socket, stop, limits)
    finally:
        context.destroy(linger=0)


@dataclass
class BusSource:
    """A `WeightSource`. Whatever is asked for is asked for again when it stays out."""

    socket: zmq.Socket
    stop: threading.Event
    limits: PullLimits
    received_bytes: int = 0
    device_copy: None = None
    _version: int = -1
    _heard: float = field(default_factory=time.monotonic)

    def manifest(self, version: int) -> Manifest:
        self._version = version
        asked = 0.0
        while True:
            if time.monotonic() - asked > self.limits.resend_s:
                self._send(ManifestRequest(version=version))
                asked = time.monotonic()
            match self._receive():
                case (Manifest(version=manifest_version) as manifest, []) if manifest_version == version:
                    return manifest

    def offer(self, version: int) -> Offer | NoTransfer:
        """How the whole of a version can be had without the bus."""
        self._version = version
        asked = 0.0
        while True:
            if time.monotonic() - asked > self.limits.resend_s:
                self._send(TransferRequest(version=version))
                asked = time.monotonic()
            match self._receive():
                case (MappedOffer() | CollectiveOffer() | NoTransfer() as answer, []) if answer.version == version:
                    return answer

    def whole(self, manifest: Manifest) -> int:
        fd = os.memfd_create(f"weights-{manifest.version}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, manifest.num_bytes)
            with mmap.mmap(fd, manifest.num_bytes) as buffer:
                self._fill(manifest, buffer)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def is_private(self) -> bool:
        return True

    def fall_back(self) -> bool:
        return False

    def chunks(self, delta: Delta) -> Iterator[Frame]:
        left = delta.num_bytes
        for _, data in self._fetch(delta.version, delta.num_chunks, delta=True):
            left -= data.nbytes
            if left < 0:
                raise MalformedMessage(f"a delta of more than the {delta.num_bytes} bytes that were announced")
            yield data

    def _fill(self, manifest: Manifest, buffer: mmap.mmap) -> None:
        version = manifest.version if manifest.whole_version < 0 else manifest.whole_version
        for index, data in self._fetch(version, -(-manifest.num_bytes // manifest.chunk_bytes), delta=False):
            start = index * manifest.chunk_bytes
            size = min(manifest.chunk_bytes, manifest.num_bytes - start)
            if data.nbytes != size:
                raise MalformedMessage(f"chunk {index} has {data.nbytes} bytes, expected {size}")
            buffer[start : start + size] = data

    def _fetch(self, version: int, count: int, *, delta: bool) -> Iterator[tuple[int, memoryview]]:
        """(index, bytes) of every chunk once."""
        self._version = version
        unasked = iter(range(count))
        asked: dict[int, float] = {}
        arrived = 0
        while arrived < count:
            self._ask_again(version, asked, delta)
            while len(asked) < OUTSTANDING_CHUNKS and (index := next(unasked, None)) is not None:
                asked[index] = self._request(version, index, delta)
            match self._receive():
                case (Chunk() as chunk, [data]) if chunk.index in asked and (chunk.version, chunk.delta) == (
                    version,
                    delta,
                ):
                    del asked[chunk.index]
                    arrived += 1
                    self.received_bytes += data.nbytes
                    yield chunk.index, data

    def _ask_again(self, version: int, asked: dict[int, float], delta: bool) -> None:
        now = time.monotonic()
        for index in [index for index, since in asked.items() if now - since > self.limits.resend_s]:
            logger.warning("version %d: chunk %d did not come; asking again", version, index)
            asked[index] = self._request(version, index, delta)

    def _request(self, version: int, index: int, delta: bool) -> float:
        self._send(ChunkRequest(version=version, index=index, delta=delta))
        return time.monotonic()

    def _send(self, request: ManifestRequest | ChunkRequest | TransferRequest) -> None:
        """Where nobody takes it, as where the key was refused, the silence that follows ends the pull."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(encode_header(request), zmq.DONTWAIT)

    def _receive(self) -> tuple[Any, list[memoryview]] | None:
        """The next answer; None if none came for a moment."""
        silence = time.monotonic() - self._heard
        if self.stop.is_set():
            raise PullError(f"version {self._version}: given up")
        if not self.socket.poll(POLL_MS if silence < self.limits.silence_s else 0):
            if silence >= self.limits.silence_s:
                raise PullError(f"version {self._version}: the weight server has been silent for {silence:.0f} s")
            return None
        header, *frames = self.socket.recv_multipart(copy=False)
        self._heard = time.monotonic()
        message = decode_header(header.buffer, _decoder)
        if isinstance(message, VersionGone) and message.version == self._version:
            raise VersionGoneError(
                f"version {self._version} is not kept by the learner, whose newest is {message.newest}"
            )
        return message, [frame.buffer for frame in frames]
