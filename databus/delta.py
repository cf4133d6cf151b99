"""The codec of deltas: the words of a version that differ from another's, as places and new values.

A chunk is a zstd frame: a header, a table of blocks, then the gaps between the places that differ and the new values,
their bytes in planes (`databus.delta_kernels`). A delta overwrites: putting it in twice is harmless. What is received
is checked in full before a word is written: nothing is ever written beyond the version, whatever the bytes say.
"""

import struct
from collections.abc import Iterator

import numpy as np
import zstandard

from databus.codec import Array, MalformedMessage
from databus.delta_kernels import COUNT, FIRST, LENGTH, diff_blocks, first_beyond, pack_blocks, write_blocks

BLOCK_WORDS = 1 << 16
CHUNK_WORDS = 1 << 22
"""Words that a chunk may say something of: 8 or 16 MiB."""
WORDS = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
HEADER = struct.Struct("<II")  # blocks, bytes of a word
ROW = 3 * 8
MAX_RAW_BYTES = 1 << 26
"""Of a chunk: the largest that this encoder makes has 17 MiB."""


class MalformedDelta(MalformedMessage):
    """What it says cannot be, or does not fit the version that it is put into."""


class DeltaEncoder:
    """Collects differences into chunks; one thread at a time. Its arrays are used again and again."""

    def __init__(self, word_bytes: int, level: int) -> None:
        """Args: level: zstd's; it takes 1 in about the time that comparing takes."""
        dtype = WORDS[word_bytes]
        self._word_bytes = word_bytes
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
        self._positions = np.empty(CHUNK_WORDS, np.uint32)
        self._values = np.empty(CHUNK_WORDS, dtype)
        # A stretch is cut into at most one more block than there are whole ones, and all together fill CHUNK_WORDS.
        self._table = np.empty((2 * CHUNK_WORDS // BLOCK_WORDS + 2, 3), np.int64)
        self._tables: list[Array] = []
        self._reset()

    def take_tables(self) -> list[Array]:
        """Of the chunks that were given since this was last called, as `apply_chunk` returns them."""
        tables, self._tables = self._tables, []
        return tables

    def encode(self, old: Array, new: Array, first: int) -> Iterator[bytes]:
        """Take in what differs; `old` becomes equal to `new`. Gives the chunks that became full.

        Args: old, new: words [n]. first: place of their first word in the version.
        """
        done = 0
        while done < len(new):
            if self._spanned >= CHUNK_WORDS or self._num_blocks + 2 >= len(self._table):
                yield from self.flush()
            room = min(CHUNK_WORDS - self._spanned, (len(self._table) - self._num_blocks - 1) * BLOCK_WORDS)
            part = slice(done, min(done + room, len(new)))
            self._take(old[part], new[part], first + done)
            done = part.stop

    def flush(self) -> Iterator[bytes]:
        """What was taken in and not given yet, if it is anything."""
        if self._num_blocks:
            yield self._pack()
        self._reset()

    def _reset(self) -> None:
        self._num_blocks = self._filled = self._spanned = 0

    def _take(self, old: Array, new: Array, first: int) -> None:
        self._num_blocks, self._filled = diff_blocks(
            old,
            new,
            _eights(old),
            _eights(new),
            first,
            BLOCK_WORDS,
            self._table,
            self._num_blocks,
            self._positions,
            self._values,
            self._filled,
        )
        self._spanned += len(new)

    def _pack(self) -> bytes:
        table = self._table[: self._num_blocks].copy()
        self._tables.append(table)
        num_gaps = _num_gaps(table)
        begin = HEADER.size + table.nbytes
        raw = np.empty(begin + 2 * num_gaps + self._word_bytes * self._filled, np.uint8)
        HEADER.pack_into(raw.data, 0, self._num_blocks, self._word_bytes)
        raw[HEADER.size : begin] = table.reshape(-1).view(np.uint8)
        pack_blocks(table, self._num_blocks, self._positions, self._values, num_gaps, self._filled, raw[begin:])
        return self._compressor.compress(raw.data)


def apply_chunk(chunk: bytes | memoryview, words: Array) -> Array:
    """Overwrite what differs.

    Args: words: the whole version [n], of the encoder's type; unchanged where this raises.
    Returns: int64 [blocks, 3]: first word, length, and number of values of each block that was written to.
    Raises: MalformedDelta.
    """
    raw = _decompress(chunk)
    if len(raw) < HEADER.size:
        raise MalformedDelta(f"a chunk of {len(raw)} bytes")
    num_blocks, word_bytes = HEADER.unpack_from(raw)
    if word_bytes != words.itemsize:
        raise MalformedDelta(f"words of {word_bytes} bytes, those of the version have {words.itemsize}")
    begin = HEADER.size + ROW * num_blocks
    if begin > len(raw):
        raise MalformedDelta(f"{num_blocks} blocks in a chunk of {len(raw)} bytes")
    table = np.frombuffer(raw, np.int64, 3 * num_blocks, HEADER.size).reshape(-1, 3)
    _check_table(table, len(words))
    num_gaps, num_values = _num_gaps(table), int(table[:, COUNT].sum())
    size = 2 * num_gaps + word_bytes * num_values
    if size != len(raw) - begin:
        raise MalformedDelta(f"{len(raw) - begin} bytes of gaps and values, expected {size}")
    planes = np.frombuffer(raw, np.uint8, size, begin)
    beyond = first_beyond(table, planes, num_gaps)
    if beyond >= 0:
        raise MalformedDelta(f"block {beyond} has places beyond its {table[beyond, LENGTH]} words")
    write_blocks(table, planes, num_gaps, num_values, words)
    return table


def _eights(words: Array) -> Array:
    """The same memory, eight bytes at a time, as far as that goes."""
    return words[: len(words) - len(words) % (8 // words.itemsize)].view(np.uint64)


def _decompress(chunk: bytes | memoryview) -> bytes:
    try:
        size = zstandard.frame_content_size(chunk)
        if not 0 <= size <= MAX_RAW_BYTES:  # -1: the frame does not say
            raise MalformedDelta(f"a chunk says that it is {size} bytes long, {MAX_RAW_BYTES} are allowed")
        return zstandard.ZstdDecompressor().decompress(chunk, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedDelta(f"a chunk that is no zstd frame: {error}") from None


def _check_table(table: Array, num_words: int) -> None:
    first, length, count = table[:, FIRST], table[:, LENGTH], table[:, COUNT]
    wrong = (length < 1) | (length > BLOCK_WORDS) | (count < 1) | (count > length) | (first < 0)
    wrong |= first > num_words - length
    if wrong.any():
        at = int(wrong.argmax())
        raise MalformedDelta(f"block {at} has {count[at]} of {length[at]} words at {first[at]}, of {num_words} in all")


def _num_gaps(table: Array) -> int:
    return int(table[:, COUNT][table[:, COUNT] < table[:, LENGTH]].sum())


def touched(table: Array, starts: Array) -> set[int]:
    """Which tensors a chunk may have changed.

    Args: table: as `apply_chunk` returns it. starts: int64 [tensors], rising: the first word of each.
    """
    first = np.searchsorted(starts, table[:, FIRST], "right") - 1
    last = np.searchsorted(starts, table[:, FIRST] + table[:, LENGTH] - 1, "right") - 1
    return {tensor for low, high in zip(first.tolist(), last.tolist(), strict=True) for tensor in range(low, high + 1)}
