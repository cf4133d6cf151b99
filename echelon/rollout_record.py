"""A run's completed training groups on disk, in their order, for replaying them (`draft.record`).

A record is its length and then as many bytes: the group in msgpack, deflated. Whatever a killed broker left unfinished
at the end is passed over by readers and cut off before more is written.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from databus.codec import Array
from databus.groups import Group
from databus.history import problem_key

LENGTH = struct.Struct("<I")
MAX_RECORD_BYTES = 1 << 30
LEVEL = 1  # the broker has other things to do


class RolloutRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A group. Arrays are little-endian int32, as in `databus.groups.GROUP_COLUMNS`.

    problem: `databus.history.problem_key`. epoch: how often all prompts had been leased before.
    """

    problem: int
    cursor: int
    epoch: int
    group_id: str
    prompt_ids: bytes
    lengths: bytes
    token_ids: bytes
    version_values: bytes
    version_lengths: bytes

    def prompt(self) -> Array:
        """int32 [P]."""
        return _array(self.prompt_ids)

    def completions(self) -> list[Array]:
        """int32 [t] each."""
        return np.split(_array(self.token_ids), np.cumsum(_array(self.lengths))[:-1])

    def newest_version(self) -> int:
        """Of all its tokens; 0 where it has none."""
        return int(_array(self.version_values).max(initial=0))


def record_of(cursor: int, epoch: int, group_id: str, group: Group) -> RolloutRecord:
    columns = ("prompt_ids", "lengths", "token_ids", "version_values", "version_lengths")
    arrays = {name: np.ascontiguousarray(getattr(group, name), "<i4").tobytes() for name in columns}
    key = problem_key(group.prompt_ids.tolist())
    return RolloutRecord(problem=key, cursor=cursor, epoch=epoch, group_id=group_id, **arrays)


class RolloutWriter:
    """Appends groups; a `databus.prompts.GroupRecorder`."""

    def __init__(self, file: Path, num_prompts: int) -> None:
        """Args: num_prompts: of an epoch. A file that is there is gone on with."""
        self._num_prompts = num_prompts
        self._file = file.open("ab", buffering=0)
        self._file.truncate(_whole_bytes(file))

    def record(self, cursor: int, group_id: str, group: Group) -> None:
        record = record_of(cursor, cursor // self._num_prompts, group_id, group)
        payload = zlib.compress(msgspec.msgpack.encode(record), LEVEL)
        self._file.write(LENGTH.pack(len(payload)) + payload)

    def close(self) -> None:
        self._file.close()


def read_rollouts(file: Path) -> Iterator[RolloutRecord]:
    """Records in their order. Raises: ValueError, in one line, for a missing file or a damaged record."""
    decoder = msgspec.msgpack.Decoder(RolloutRecord)
    try:
        source = file.open("rb")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: only a run with draft.record=true keeps its rollouts") from None
    with source:
        for number, payload in enumerate(_payloads(source)):
            try:
                record = decoder.decode(zlib.decompress(payload))
                _check(record)
            except (zlib.error, msgspec.MsgspecError, ValueError) as error:
                raise ValueError(f"{file}: record {number} is damaged: {error}") from None
            yield record


def _check(record: RolloutRecord) -> None:
    num_tokens = len(_array(record.token_ids))
    for counts in (_array(record.lengths), _array(record.version_lengths)):
        if (counts < 0).any() or int(counts.sum(dtype=np.int64)) != num_tokens:
            raise ValueError(f"lengths do not add up to {num_tokens} tokens")
    if not len(_array(record.lengths)) or not len(_array(record.prompt_ids)):
        raise ValueError("no prompt, or no completions")
    if (_array(record.token_ids) < 0).any() or (_array(record.prompt_ids) < 0).any():
        raise ValueError("a negative token id")


def _payloads(source: BinaryIO) -> Iterator[bytes]:
    """Up to the first that is not whole."""
    while True:
        head = source.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        (size,) = LENGTH.unpack(head)
        payload = source.read(size) if size <= MAX_RECORD_BYTES else b""
        if len(payload) < size:
            return
        yield payload


def _whole_bytes(file: Path) -> int:
    """How far the file holds whole records."""
    with file.open("rb") as source:
        return sum(LENGTH.size + len(payload) for payload in _payloads(source))


def _array(data: bytes) -> Array:
    """Raises: ValueError where the bytes are not whole numbers."""
    return np.frombuffer(data, "<i4")
