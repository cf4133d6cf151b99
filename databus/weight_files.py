"""Versions as files of a folder: what they are called, and what is in them. A file is complete or absent.

VERSION.manifest      the `Manifest`, in msgpack; written last
VERSION.safetensors   the version in whole
VERSION.raw           the same as its flat buffer, which can be mapped and served as it is
VERSION.delta         what differs from the version before: the number of chunks, their sizes, and the chunks
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from databus.codec import MalformedMessage
from databus.messages import Manifest

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""As safetensors call them."""
MAX_HEADER_BYTES = 1 << 28
MAX_CHUNKS = 1 << 24
LENGTH = struct.Struct("<Q")


def path_of(folder: Path, version: int, suffix: str) -> Path:
    return folder / f"{version:09d}.{suffix}"


def write_file(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Atomically, readable by this user alone. Raises: OSError; then nothing is left of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) :]  # at most 2 GiB at a time
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_file(path: Path) -> int:
    """A descriptor. Raises: OSError; FileNotFoundError where the version is gone."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def safetensors_parts(manifest: Manifest, data: memoryview) -> Iterator[bytes | memoryview]:
    """What a file in that format has: its header, then the tensors one after another, without what lies between."""
    header: dict[str, object] = {"__metadata__": {"version": str(manifest.version), "hash": f"{manifest.hash:016x}"}}
    end = 0
    for spec in manifest.tensors:
        header[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (end, end + spec.num_bytes),
        }
        end += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield LENGTH.pack(len(encoded)) + encoded
    for spec in manifest.tensors:
        yield data[spec.offset : spec.offset + spec.num_bytes]


def read_safetensors(descriptor: int, manifest: Manifest, buffer: memoryview) -> None:
    """Put the tensors where the manifest has them. Args: buffer: writable, of the manifest's length.

    Raises: MalformedMessage where the file is not what the manifest says.
    """
    (length,) = LENGTH.unpack(_read(descriptor, LENGTH.size, 0))
    if length > MAX_HEADER_BYTES:
        raise MalformedMessage(f"a safetensors header of {length} bytes")
    try:
        header = json.loads(_read(descriptor, length, LENGTH.size))
    except ValueError as error:
        raise MalformedMessage(f"a safetensors header that is no JSON: {error}") from None
    begin = LENGTH.size + length
    for spec in manifest.tensors:
        entry = header.get(spec.name) if isinstance(header, dict) else None
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(each, int) for each in offsets)):
            raise MalformedMessage(f"tensor {spec.name!r} is not in the file")
        if offsets[0] < 0 or offsets[1] - offsets[0] != spec.num_bytes:
            raise MalformedMessage(f"tensor {spec.name!r} has {offsets[1] - offsets[0]} bytes in the file")
        read_into(descriptor, buffer[spec.offset : spec.offset + spec.num_bytes], begin + offsets[0])


def read_into(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Raises: MalformedMessage where the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)  # at most 2 GiB at a time
        if not count:
            raise MalformedMessage(f"a file that ends {len(buffer)} bytes too early")
        buffer, offset = buffer[count:], offset + count


def delta_parts(chunks: Sequence[bytes]) -> Iterator[bytes]:
    yield LENGTH.pack(len(chunks)) + b"".join(LENGTH.pack(len(chunk)) for chunk in chunks)
    yield from chunks


def read_delta(descriptor: int) -> Iterator[bytes]:
    """Its chunks, one at a time. Raises: MalformedMessage where the file is not what it says."""
    (count,) = LENGTH.unpack(_read(descriptor, LENGTH.size, 0))
    if count > MAX_CHUNKS:
        raise MalformedMessage(f"a delta of {count} chunks")
    offset = LENGTH.size * (1 + count)
    available = os.fstat(descriptor).st_size - offset
    for (size,) in struct.iter_unpack(LENGTH.format, _read(descriptor, LENGTH.size * count, LENGTH.size)):
        if size > available:
            raise MalformedMessage(f"a chunk of {size} bytes, {available} are left")
        yield _read(descriptor, size, offset)
        offset, available = offset + size, available - size


def _read(descriptor: int, num_bytes: int, offset: int) -> bytes:
    data = bytearray(num_bytes)
    read_into(descriptor, memoryview(data), offset)
    return bytes(data)
