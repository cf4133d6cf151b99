import contextlib
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import xxhash
import zmq

from databus.codec import encode_header
from databus.keys import ClientKeys, client_keys, new_keys, server_keys
from databus.messages import Chunk, ChunkRequest, FromWeightServer, Manifest, ManifestRequest, VersionGone
from databus.transport import make_socket
from learner.model import ModelOptions, build_model, load_causal_lm
from learner.snapshot import Snapshot, Snapshotter
from learner.weights_out import WeightServer

CHUNK_BYTES = 1000  # divides neither the tensors nor the whole
decoder = msgspec.msgpack.Decoder(FromWeightServer)


class Client:
    """A scripted worker: one DEALER socket."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        self._context = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER, 1 << 20, keys)
        self._socket.connect(address)

    def send(self, *frames: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # where the key was refused there is nobody to send to
            self._socket.send_multipart(frames, zmq.DONTWAIT)

    def answered(self, within_ms: int) -> bool:
        return bool(self._socket.poll(within_ms))

    def receive(self) -> tuple[Any, list[bytes]]:
        assert self._socket.poll(5000), "no answer"
        header, *frames = self._socket.recv_multipart()
        return decoder.decode(header), frames

    def ask(self, request: Any) -> tuple[Any, list[bytes]]:
        self.send(encode_header(request))
        return self.receive()

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def server() -> Iterator[WeightServer]:
    server = WeightServer("ipc:///somewhere", keep=2)
    yield server
    server.close()


@pytest.fixture
def client(server: WeightServer) -> Iterator[Client]:
    client = Client(server.address)
    yield client
    client.close()


@pytest.fixture
def snapshots(single_rank: None, tiny_model: Path) -> Callable[[int], Snapshot]:
    policy = build_model(tiny_model, ModelOptions())
    snapshotter = Snapshotter(policy.causal_lm, "bfloat16", rank=0, chunk_bytes=CHUNK_BYTES)

    def take(version: int) -> Snapshot:
        snapshot = snapshotter.take(version)
        assert snapshot is not None
        return snapshot

    return take


def test_a_version_is_pulled_whole(
    server: WeightServer, client: Client, snapshots: Callable[[int], Snapshot], tiny_model: Path
) -> None:
    server.publish(snapshots(7))
    manifest, _ = client.ask(ManifestRequest(version=7))
    assert isinstance(manifest, Manifest) and manifest.version == 7
    buffer = bytearray()
    for index in range(-(-manifest.num_bytes // manifest.chunk_bytes)):
        chunk, frames = client.ask(ChunkRequest(version=7, index=index))
        assert chunk == Chunk(version=7, index=index)
        buffer += frames[0]
    assert len(buffer) == manifest.num_bytes

    expected = {name: tensor.detach() for name, tensor in load_causal_lm(tiny_model).named_parameters()}
    assert {spec.name for spec in manifest.tensors} == expected.keys()
    assert "lm_head.weight" not in expected  # tied
    for spec in manifest.tensors:
        part = buffer[spec.offset : spec.offset + spec.num_bytes]
        assert xxhash.xxh3_64_intdigest(part) == spec.xxh3
        values = torch.frombuffer(part, dtype=torch.bfloat16).view(spec.shape)
        assert spec.dtype == "bfloat16"
        assert torch.equal(values, expected[spec.name].bfloat16()), spec.name


def test_old_and_future_versions_are_gone(
    server: WeightServer, client: Client, snapshots: Callable[[int], Snapshot]
) -> None:
    assert client.ask(ManifestRequest(version=0))[0] == VersionGone(version=0, newest=-1)
    for version in (3, 4, 5):
        server.publish(snapshots(version))
    assert client.ask(ManifestRequest(version=3))[0] == VersionGone(version=3, newest=5)
    assert client.ask(ChunkRequest(version=6, index=0))[0] == VersionGone(version=6, newest=5)
    assert isinstance(client.ask(ManifestRequest(version=4))[0], Manifest)


@pytest.mark.parametrize(
    "frames",
    [
        (b"not msgpack",),
        (b"",),
        (encode_header(ManifestRequest(version=1)), b"one frame too many"),
        (encode_header(VersionGone(version=1, newest=1)),),
        (encode_header(ChunkRequest(version=1, index=10**6)),),
        (encode_header(ChunkRequest(version=1, index=-1)),),
    ],
)
def test_malformed_requests_are_ignored_and_counted(
    frames: tuple[bytes, ...], server: WeightServer, client: Client, snapshots: Callable[[int], Snapshot]
) -> None:
    server.publish(snapshots(1))
    client.send(*frames)
    answer, _ = client.ask(ManifestRequest(version=1))
    assert isinstance(answer, Manifest)
    assert server.malformed_requests == 1


def test_a_peer_that_has_gone_does_no_harm(
    server: WeightServer, client: Client, snapshots: Callable[[int], Snapshot]
) -> None:
    server.publish(snapshots(1))
    leaving = Client(server.address)
    for _ in range(50):
        leaving.send(encode_header(ChunkRequest(version=1, index=0)))
    leaving.close()
    assert isinstance(client.ask(ManifestRequest(version=1))[0], Manifest)


def test_a_version_is_served_unchanged_while_training_goes_on(
    server: WeightServer, client: Client, single_rank: None, tiny_model: Path
) -> None:
    policy = build_model(tiny_model, ModelOptions())
    snapshot = Snapshotter(policy.causal_lm, "float32", rank=0).take(0)
    assert snapshot is not None
    server.publish(snapshot)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    manifest, _ = client.ask(ManifestRequest(version=0))
    _, frames = client.ask(ChunkRequest(version=0, index=0))
    spec = manifest.tensors[0]
    served = np.frombuffer(frames[0][: spec.num_bytes], np.float32)
    initial = dict(load_causal_lm(tiny_model).named_parameters())[spec.name]
    assert np.array_equal(served, initial.detach().flatten().numpy())


def test_ipc_socket_is_private_and_goes_away(server: WeightServer) -> None:
    folder = Path(server.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 2
    assert not folder.exists()


def test_beside_a_tcp_bus_on_loopback(snapshots: Callable[[int], Snapshot]) -> None:
    server = WeightServer("tcp://127.0.0.1:5555", keep=2)
    try:
        assert server.address.startswith("tcp://127.0.0.1:")
        assert not server.address.endswith(":5555")
        server.publish(snapshots(1))
        client = Client(server.address)
        assert isinstance(client.ask(ManifestRequest(version=1))[0], Manifest)
        client.close()
    finally:
        server.close()


def test_with_keys_weights_are_for_workers_alone(snapshots: Callable[[int], Snapshot], tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    server = WeightServer("tcp://127.0.0.1:*", keep=2, keys=server_keys(tmp_path / "keys", "learner", ["worker"]))
    try:
        server.publish(snapshots(1))
        worker = Client(server.address, client_keys(tmp_path / "keys", "worker", server="learner"))
        assert isinstance(worker.ask(ManifestRequest(version=1))[0], Manifest)
        others = [Client(server.address), Client(server.address, client_keys(tmp_path / "keys", "observer", "learner"))]
        for other in others:
            other.send(encode_header(ManifestRequest(version=1)))
            assert not other.answered(within_ms=500)
        for client in (worker, *others):
            client.close()
    finally:
        server.close()
