"""Wire format: one msgpack header frame, then one raw little-endian frame a column.

Encoding copies nothing: a column frame is the array's own memory. Decoding is typed, checks dtypes
against a whitelist and every frame's length against its header, and gives read-only views.
"""

import math
from collections.abc import Mapping, Sequence
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
    frames: list[Frame] = []
    for name, array in arrays.items():
        packed = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        dtype = packed.dtype.str
        if dtype not in DTYPES:
            raise ValueError(f"column {name!r} has dtype {dtype}; allowed: {sorted(DTYPES)}")
        columns.append(Column(name=name, dtype=dtype, shape=packed.shape))
        frames.append(packed.reshape(-1).view(np.uint8).data if packed.size else b"")
    return tuple(columns), frames


def decode_header(frame: Frame, decoder: "msgspec.msgpack.Decoder[T]") -> T:
    """Raises: MalformedMessage for anything that is not one of the decoder's messages."""
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"bad header: {error}") from None


def decode_columns(columns: Sequence[Column], frames: Sequence[Frame]) -> dict[str, Array]:
    """Read-only views of the frames.

    Raises: MalformedMessage where a dtype is not allowed, a shape is wrong, a name appears twice, or a
        frame's length is not what its header says.
    """
    if len(columns) != len(frames):
        raise MalformedMessage(f"{len(columns)} columns announced, {len(frames)} frames received")
    arrays: dict[str, Array] = {}
    for column, frame in zip(columns, frames, strict=True):
        if column.name in arrays:
            raise MalformedMessage(f"column {column.name!r} appears twice")
        arrays[column.name] = _decode_column(column, frame)
    return arrays


def _decode_column(column: Column, frame: Frame) -> Array:
    dtype = DTYPES.get(column.dtype)
    if dtype is None:
        raise MalformedMessage(f"column {column.name!r}: dtype {column.dtype!r} is not allowed")
    if len(column.shape) > MAX_DIMENSIONS or min(column.shape, default=0) < 0:
        raise MalformedMessage(f"column {column.name!r}: bad shape {column.shape}")
    expected = dtype.itemsize * math.prod(column.shape)  # Python integers: a huge shape cannot overflow
    view = memoryview(frame).toreadonly()
    if view.nbytes != expected:
        raise MalformedMessage(f"column {column.name!r}: {view.nbytes} bytes, its header says {expected}")
    array = np.frombuffer(view, dtype=dtype)
    return array if len(column.shape) == 1 else array.reshape(column.shape)
