import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from databus.codec import MalformedMessage
from databus.messages import Manifest, TensorSpec
from databus.weight_files import (
    delta_parts,
    open_file,
    path_of,
    read_delta,
    read_safetensors,
    safetensors_parts,
    write_file,
)

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.float32)}
MANIFEST = Manifest(
    version=3,
    num_bytes=100,
    chunk_bytes=10,
    tensors=(
        TensorSpec(name="a", dtype="float32", shape=(2, 3), offset=0, num_bytes=24, xxh3=1),
        TensorSpec(name="b", dtype="float32", shape=(5,), offset=64, num_bytes=20, xxh3=2),
    ),
)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    data = bytearray(100)
    data[0:24], data[64:84] = TENSORS["a"].tobytes(), TENSORS["b"].tobytes()
    path = path_of(tmp_path, 3, "safetensors")
    write_file(path, list(safetensors_parts(MANIFEST, memoryview(bytes(data)))))
    return path


def test_others_read_it_as_safetensors(whole: Path) -> None:
    assert whole.name == "000000003.safetensors"
    assert stat.S_IMODE(whole.stat().st_mode) == 0o600
    loaded = load_file(whole)
    assert loaded.keys() == TENSORS.keys()
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def read(path: Path) -> bytearray:
    buffer = bytearray(MANIFEST.num_bytes)
    descriptor = open_file(path)
    try:
        read_safetensors(descriptor, MANIFEST, memoryview(buffer))
    finally:
        os.close(descriptor)
    return buffer


def test_tensors_go_where_the_manifest_has_them(whole: Path) -> None:
    buffer = read(whole)
    assert buffer[:24] == TENSORS["a"].tobytes()
    assert buffer[64:84] == TENSORS["b"].tobytes()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"b":', b'"c":', "'b' is not in the file"),
        (b"[24,44]", b"[24,45]", "'b' has 21 bytes"),
        (b"[24,44]", b"[-1,19]", "'b' has 20 bytes"),
        (b"[24,44]", b'"xxxxx"', "'b' is not in the file"),
        (b"[24,44]", b"[90,110]"[:7], "no JSON"),
    ],
)
def test_a_file_that_is_another(whole: Path, old: bytes, new: bytes, says: str) -> None:
    content = whole.read_bytes()
    assert old in content
    whole.write_bytes(content.replace(old, new))
    with pytest.raises(MalformedMessage, match=says):
        read(whole)


@pytest.mark.parametrize("length", [0, 7, 20, -1])
def test_a_file_that_is_cut_short(whole: Path, length: int) -> None:
    whole.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(MalformedMessage):
        read(whole)


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def parts():
        yield b"half"
        raise KeyError

    with pytest.raises(KeyError):
        write_file(path, parts())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def chunks_of(path: Path) -> list[bytes]:
    descriptor = open_file(path)
    try:
        return list(read_delta(descriptor))
    finally:
        os.close(descriptor)


def test_deltas(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    for chunks in ([], [b"one"], [b"one", b"", b"three" * 1000]):
        write_file(path, list(delta_parts(chunks)))
        assert chunks_of(path) == chunks
    content = path.read_bytes()
    for damaged in (content[:-1], content[:10], b"\xff" * 8, b"", content[:8] + b"\xff" * 8 + content[16:]):
        path.write_bytes(damaged)
        with pytest.raises(MalformedMessage):
            chunks_of(path)
