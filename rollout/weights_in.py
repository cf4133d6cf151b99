"""Pulls a policy version from the learner's weight server into anonymous shared memory.

PullError
└── VersionGoneError   the server keeps that version no longer; a newer one will be announced
"""

import contextlib
import logging
import mmap
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from databus.address import check_address
from databus.codec import MalformedMessage, decode_header, encode_header
from databus.keys import ClientKeys
from databus.messages import Chunk, ChunkRequest, FromWeightServer, Manifest, ManifestRequest, VersionGone
from databus.transport import is_ipv6, make_socket
from rollout.engine.base import Snapshot
from rollout.engine.tensors import first_mismatch

logger = logging.getLogger(__name__)

OUTSTANDING_CHUNKS = 8
MAX_MESSAGE_BYTES = 1 << 27
POLL_MS = 100

_decoder: "msgspec.msgpack.Decoder[FromWeightServer]" = msgspec.msgpack.Decoder(FromWeightServer)


class PullError(Exception):
    """A version could not be pulled; one line for a person."""


class VersionGoneError(PullError):
    """The server has dropped the version (or does not have it yet)."""


@dataclass(frozen=True, kw_only=True)
class PullLimits:
    """resend_s: an answer that has not come by then is asked for again. silence_s: without any, the pull fails."""

    resend_s: float = 5.0
    silence_s: float = 60.0


def pull_snapshot(
    address: str,
    version: int,
    num_bytes: int,
    stop: threading.Event,
    limits: PullLimits | None = None,
    keys: ClientKeys | None = None,
) -> Snapshot:
    """Fetch `version`, check every tensor's xxh3, and return it; whoever gets it closes it. Blocks for seconds.

    Args: num_bytes: its size as it was announced. stop: once set, the pull ends within a moment. keys: None for plain
        text.
    Raises: VersionGoneError; PullError for silence, a wrong answer, or a checksum that does not match; ValueError for
        an address that the bus may not use.
    """
    context = zmq.Context()
    socket = make_socket(context, zmq.DEALER, MAX_MESSAGE_BYTES, keys)
    socket.setsockopt(zmq.IPV6, is_ipv6(address))
    try:
        socket.connect(check_address(address, encrypted=keys is not None))
        return _Pull(socket, version, num_bytes, stop, limits or PullLimits()).run()
    except MalformedMessage as error:
        raise PullError(f"version {version}: the weight server sent something malformed: {error}") from error
    finally:
        context.destroy(linger=0)


@dataclass
class _Pull:
    """One pull. A few chunks are outstanding at any time; each is asked for again when it stays out."""

    socket: zmq.Socket
    version: int
    num_bytes: int
    stop: threading.Event
    limits: PullLimits
    _asked: dict[int, float] = field(default_factory=dict)
    _heard: float = field(default_factory=time.monotonic)

    def run(self) -> Snapshot:
        manifest = self._manifest()
        fd = os.memfd_create(f"weights-{self.version}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, manifest.num_bytes)
            with mmap.mmap(fd, manifest.num_bytes) as buffer:
                self._fetch(manifest, buffer)
                wrong = first_mismatch(manifest, buffer)
            if wrong:
                raise PullError(f"version {self.version}: tensor {wrong!r} does not match its checksum")
        except BaseException:
            os.close(fd)
            raise
        return Snapshot(version=self.version, manifest=manifest, fd=fd)

    def _manifest(self) -> Manifest:
        asked = 0.0
        while True:
            if time.monotonic() - asked > self.limits.resend_s:
                self._send(ManifestRequest(version=self.version))
                asked = time.monotonic()
            match self._receive():
                case (Manifest(version=self.version) as manifest, []):
                    _check(manifest, self.num_bytes)
                    return manifest

    def _send(self, request: ManifestRequest | ChunkRequest) -> None:
        """Where nobody takes it, as where the key was refused, the silence that follows ends the pull."""
        with contextlib.suppress(zmq.Again):
            self.socket.send(encode_header(request), zmq.DONTWAIT)

    def _fetch(self, manifest: Manifest, buffer: mmap.mmap) -> None:
        missing = set(range(-(-manifest.num_bytes // manifest.chunk_bytes)))
        while missing:
            self._ask(missing)
            match self._receive():
                case (Chunk(version=self.version, index=index), [data]) if index in missing:
                    start = index * manifest.chunk_bytes
                    size = min(manifest.chunk_bytes, manifest.num_bytes - start)
                    if data.nbytes != size:
                        raise MalformedMessage(f"chunk {index} has {data.nbytes} bytes, expected {size}")
                    buffer[start : start + size] = data
                    missing.discard(index)
                    self._asked.pop(index, None)

    def _ask(self, missing: set[int]) -> None:
        now = time.monotonic()
        for index, asked in self._asked.items():
            if now - asked > self.limits.resend_s:
                logger.warning("version %d: chunk %d did not come; asking again", self.version, index)
                self._request(index)
        for index in sorted(missing - self._asked.keys())[: OUTSTANDING_CHUNKS - len(self._asked)]:
            self._request(index)

    def _request(self, index: int) -> None:
        self._send(ChunkRequest(version=self.version, index=index))
        self._asked[index] = time.monotonic()

    def _receive(self) -> tuple[Any, list[memoryview]] | None:
        """The next answer; None if none came for a moment."""
        silence = time.monotonic() - self._heard
        if silence > self.limits.silence_s:
            raise PullError(f"version {self.version}: the weight server has been silent for {silence:.0f} s")
        if self.stop.is_set():
            raise PullError(f"version {self.version}: given up")
        if not self.socket.poll(POLL_MS):
            return None
        header, *frames = self.socket.recv_multipart(copy=False)
        self._heard = time.monotonic()
        message = decode_header(header.buffer, _decoder)
        if isinstance(message, VersionGone) and message.version == self.version:
            raise VersionGoneError(
                f"version {self.version} is not kept by the learner, whose newest is {message.newest}"
            )
        return message, [frame.buffer for frame in frames]


def _check(manifest: Manifest, num_bytes: int) -> None:
    if manifest.num_bytes != num_bytes:
        raise MalformedMessage(f"a manifest of {manifest.num_bytes} bytes, {num_bytes} were announced")
    if manifest.num_bytes < 1 or manifest.chunk_bytes < 1:
        raise MalformedMessage(f"a manifest of {manifest.num_bytes} bytes in chunks of {manifest.chunk_bytes}")
    for spec in manifest.tensors:
        if spec.offset < 0 or spec.num_bytes < 0 or spec.offset + spec.num_bytes > manifest.num_bytes:
            raise MalformedMessage(f"tensor {spec.name!r} lies outside the manifest's {manifest.num_bytes} bytes")
