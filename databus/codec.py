"""Wire format: a msgpack header frame, then columns, raw and little-endian: small ones in one frame, others alone.

Encoding copies small columns only: another's frame is the array's own memory. Decoding is typed, checks dtypes against
a whitelist and every frame's length against its header, and gives read-only views.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from databus.messages import Column

T = TypeVar("T")
Array = NDArray[Any]
Frame = bytes | memoryview

DTYPES = {name: np.dtype(name) for name in ("<i4", "<i8", "<f4", "<u8", "|u1")}
"""The whitelist."""
MAX_DIMENSIONS = 4
SHARED_BYTES = 1024
"""Columns of at most so many bytes share the first frame, each at a multiple of `ALIGNMENT_BYTES`: to send and receive
another frame takes longer than to copy them."""
ALIGNMENT_BYTES = 8

EMPTY = memoryview(b"")

_encoder = msgspec.msgpack.Encoder()


class MalformedMessage(ValueError):
    """What arrived is not a message of this bus; the text says why."""


def encode_header(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def encode_columns(arrays: Mapping[str, Array]) -> tuple[tuple[Column, ...], list[Frame]]:
    """Describe arrays and give their memory as frames.

    Raises: ValueError for a dtype that is not on the whitelist: that is our own mistake, not a peer's.
    """
    columns: list[Column] = []
    small: list[Frame] = []
    frames: list[Frame] = []
    for name, array in arrays.items():
        packed = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        dtype = packed.dtype.str
        if dtype not in DTYPES:
            raise ValueError(f"column {name!r} has dtype {dtype}; allowed: {sorted(DTYPES)}")
        columns.append(Column(name=name, dtype=dtype, shape=packed.shape))
        if packed.nbytes > SHARED_BYTES:
            frames.append(packed.reshape(-1).view(np.uint8).data)
        else:
            small.append(packed.tobytes() + bytes(-packed.nbytes % ALIGNMENT_BYTES))
    shared = b"".join(small)
    return tuple(columns), [shared, *frames] if shared else frames


def decode_header(frame: Frame, decoder: "msgspec.msgpack.Decoder[T]") -> T:
    """Raises: MalformedMessage for anything that is not one of the decoder's messages."""
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"bad header: {error}") from None


def frame_sizes(columns: Sequence[Column]) -> list[int]:
    """Bytes of each frame that such columns come in.

    Raises: MalformedMessage where a dtype is not allowed or a shape is wrong.
    """
    return _frame_sizes([_num_bytes(column) for column in columns])


def decode_columns(
    columns: Sequence[Column], frames: Sequence[Frame], only: Set[str] | None = None
) -> dict[str, Array]:
    """Read-only views of the frames.

    Args: only: names of those that are wanted; None: all.
    Raises: MalformedMessage where a dtype is not allowed, a shape is wrong, a name appears twice, or a
        frame's length is not what its header says.
    """
    sizes = [_num_bytes(column) for column in columns]
    views = [memoryview(frame).toreadonly() for frame in frames]
    announced = _frame_sizes(sizes)
    if len(views) != len(announced):
        raise MalformedMessage(f"{len(announced)} frames announced, {len(views)} frames received")
    for view, size in zip(views, announced, strict=True):
        if view.nbytes != size:
            raise MalformedMessage(f"a frame of {view.nbytes} bytes, its header says {size}")
    arrays: dict[str, Array] = {}
    next_frame, next_byte = int(any(0 < size <= SHARED_BYTES for size in sizes)), 0
    for column, size in zip(columns, sizes, strict=True):
        if column.name in arrays:
            raise MalformedMessage(f"column {column.name!r} appears twice")
        dtype = DTYPES[column.dtype]
        is_wanted = only is None or column.name in only
        if size > SHARED_BYTES:
            view, count, offset = views[next_frame], -1, 0
            next_frame += 1
        elif size:
            view, count, offset = views[0], size // dtype.itemsize, next_byte
            next_byte += size + -size % ALIGNMENT_BYTES
        else:
            view, count, offset = EMPTY, -1, 0
        if is_wanted:
            array = np.frombuffer(view, dtype, count, offset)
            arrays[column.name] = array if len(column.shape) == 1 else array.reshape(column.shape)
    return arrays


def _frame_sizes(sizes: Sequence[int]) -> list[int]:
    shared = sum(size + -size % ALIGNMENT_BYTES for size in sizes if size <= SHARED_BYTES)
    return [shared] * bool(shared) + [size for size in sizes if size > SHARED_BYTES]


def _num_bytes(column: Column) -> int:
    dtype = DTYPES.get(column.dtype)
    if dtype is None:
        raise MalformedMessage(f"column {column.name!r}: dtype {column.dtype!r} is not allowed")
    if len(column.shape) == 1 and column.shape[0] >= 0:  # nearly all of them
        return dtype.itemsize * column.shape[0]
    size = dtype.itemsize  # a Python integer: a huge shape cannot overflow it
    for length in column.shape:
        if length < 0 or len(column.shape) > MAX_DIMENSIONS:
            raise MalformedMessage(f"column {column.name!r}: bad shape {column.shape}")
        size *= length
    return size
