import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from databus.codec import encode_header
from databus.messages import Chunk, ChunkRequest, Manifest, ManifestRequest, ToWeightServer, VersionGone
from rollout.bus_source import OUTSTANDING_CHUNKS
from rollout.engine.base import Snapshot
from rollout.engine.tensors import tensors
from rollout.weight_source import PullError, PullLimits, VersionGoneError
from rollout.weights_in import pull_snapshot

QUICK = PullLimits(resend_s=0.2, silence_s=1.5)
CHUNK_BYTES = 1000

Answer = Callable[[ToWeightServer], list[list[bytes]]]


class Source:
    """A version to serve, as a learner has it, and what was asked of it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.manifest = msgspec.structs.replace(snapshot.manifest, chunk_bytes=CHUNK_BYTES)
        self.data = bytearray(os.pread(snapshot.fd, snapshot.manifest.num_bytes, 0))
        self.asked: list[ToWeightServer] = []

    def answer(self, request: ToWeightServer) -> list[list[bytes]]:
        self.asked.append(request)
        if isinstance(request, ManifestRequest):
            return [[encode_header(self.manifest)]]
        return [[encode_header(Chunk(version=request.version, index=request.index)), self.chunk(request.index)]]

    def chunk(self, index: int) -> bytes:
        return bytes(self.data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])

    def pull(self, address: str, limits: PullLimits = QUICK) -> Snapshot:
        return pull_snapshot(address, self.manifest.version, self.manifest.num_bytes, threading.Event(), limits)


@pytest.fixture
def source(make_snapshot: Callable) -> Source:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(60, 100, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(3, 5, 11, generator=generator),
    }
    return Source(make_snapshot(weights, 5))


@contextmanager
def serving(answer: Answer, folder: Path) -> Iterator[str]:
    """A weight server that answers as scripted."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    address = f"ipc://{folder}/weights"
    router.bind(address)
    stop = threading.Event()
    decoder = msgspec.msgpack.Decoder(ToWeightServer)

    def serve() -> None:
        while not stop.is_set():
            if router.poll(20):
                peer, request = router.recv_multipart()
                for frames in answer(decoder.decode(request)):
                    router.send_multipart([peer, *frames])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield address
    finally:
        stop.set()
        thread.join()
        router.close()
        context.term()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_pulls_what_was_published(source: Source, tmp_path: Path) -> None:
    with serving(source.answer, tmp_path) as address:
        snapshot = source.pull(address)
    assert snapshot.version == 5
    assert bytes(snapshot.map()) == bytes(source.data)
    assert {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(snapshot.manifest, snapshot.map())
    } == {
        "a": (torch.float32, (60, 100)),
        "b": (torch.bfloat16, (7,)),
        "c": (torch.float32, (3, 5, 11)),
    }
    snapshot.close()
    chunks = [request.index for request in source.asked if isinstance(request, ChunkRequest)]
    assert sorted(chunks) == list(range(-(-len(source.data) // CHUNK_BYTES))), "each chunk once"


@pytest.mark.parametrize("answered", [0, 3])
def test_few_chunks_are_outstanding(source: Source, tmp_path: Path, answered: int) -> None:
    def answer_few(request: ToWeightServer) -> list[list[bytes]]:
        answers = source.answer(request)
        return answers if isinstance(request, ManifestRequest) or request.index < answered else []

    with serving(answer_few, tmp_path) as address, pytest.raises(PullError, match="silent"):
        source.pull(address, PullLimits(resend_s=60.0, silence_s=0.5))
    chunks = [request.index for request in source.asked if isinstance(request, ChunkRequest)]
    assert chunks == list(range(answered + OUTSTANDING_CHUNKS))


def test_a_lost_chunk_is_asked_for_again(source: Source, tmp_path: Path) -> None:
    lost: set[int] = set()

    def lose_once(request: ToWeightServer) -> list[list[bytes]]:
        answers = source.answer(request)
        if isinstance(request, ChunkRequest) and request.index in (3, 11) and request.index not in lost:
            lost.add(request.index)
            return []
        return answers * 2  # and every answer comes twice

    with serving(lose_once, tmp_path) as address:
        snapshot = source.pull(address)
    assert lost == {3, 11}
    assert bytes(snapshot.map()) == bytes(source.data)
    snapshot.close()


def test_a_flipped_byte_is_noticed(source: Source, tmp_path: Path) -> None:
    source.data[source.manifest.tensors[1].offset + 3] ^= 1
    before = open_descriptors()
    with serving(source.answer, tmp_path) as address:
        with pytest.raises(PullError, match=r"version 5: tensor 'b' does not match its checksum"):
            source.pull(address)
        with pytest.raises(PullError, match="checksum"):
            source.pull(address)
    assert open_descriptors() <= before


def test_a_version_that_is_gone(source: Source, tmp_path: Path) -> None:
    def gone(request: ToWeightServer) -> list[list[bytes]]:
        if isinstance(request, ChunkRequest) and request.index > 4:
            return [[encode_header(VersionGone(version=5, newest=9))]]
        return source.answer(request)

    with serving(gone, tmp_path) as address, pytest.raises(VersionGoneError, match="whose newest is 9"):
        source.pull(address)


def test_silence_ends_the_pull(source: Source, tmp_path: Path) -> None:
    def silent(request: ToWeightServer) -> list[list[bytes]]:
        return source.answer(request) if isinstance(request, ManifestRequest) else []

    with serving(silent, tmp_path) as address, pytest.raises(PullError, match=r"silent for \d s"):
        source.pull(address)
    with pytest.raises(PullError, match="silent"):
        source.pull(f"ipc://{tmp_path}/nobody")


def test_stop_ends_the_pull(source: Source, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(PullError, match="given up"):
        pull_snapshot(f"ipc://{tmp_path}/nobody", 5, 10, stop)


def test_answers_that_make_no_sense(source: Source, tmp_path: Path) -> None:
    def answer_with(manifest: Manifest, extra: bytes = b"") -> Answer:
        def answer(request: ToWeightServer) -> list[list[bytes]]:
            if isinstance(request, ManifestRequest):
                return [[encode_header(manifest)]]
            return [[encode_header(Chunk(version=5, index=request.index)), source.chunk(request.index) + extra]]

        return answer

    replace = msgspec.structs.replace
    far = replace(source.manifest.tensors[0], offset=10**6)
    for answer, says in [
        (answer_with(replace(source.manifest, num_bytes=7)), "7 bytes, .* were announced"),
        (answer_with(replace(source.manifest, chunk_bytes=0)), "chunks of 0"),
        (answer_with(replace(source.manifest, tensors=(far,))), "tensor 'a' lies outside"),
        (answer_with(source.manifest, extra=b"x"), "has 1001 bytes, expected 1000"),
        (lambda request: [[b"nonsense"]], "bad header"),
    ]:
        folder = tmp_path / str(abs(hash(says)))
        folder.mkdir()
        with serving(answer, folder) as address, pytest.raises(PullError, match=says):
            source.pull(address)


def test_only_addresses_of_this_machine() -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        pull_snapshot("tcp://192.0.2.1:5000", 1, 10, threading.Event())
