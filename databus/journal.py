"""The journal: an append-only log of records in segments, durable in small groups, exact about what a crash tore off.

    journal/000000.log  000001.log ...

A segment starts with `MAGIC`. A record is a head, a msgpack header (`databus.records`) and its raw column frames:

    head: payload_bytes u32 · header_bytes u32 · synced_bytes u64 · xxh3-64 of the rest, seeded with its offset

`synced_bytes` says how much of the segment was durable when the record was written. So what cannot be read is told
apart: below the largest `synced_bytes` that any record bears, it is damage, and is reported; above, it is what a crash
left of records that nobody was promised, and is cut off. The seed keeps bytes that lie at the wrong place, as old
blocks of a disk do, from passing for a record.
"""

import errno
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from databus.codec import Frame, MalformedMessage, decode_header, encode_header, frame_sizes
from databus.crash import crash_point
from databus.records import Record, StateSaved

MAGIC = b"echelon journal1"
HEAD = struct.Struct("<IIQQ")
MAX_RECORD_BYTES = 1 << 30
OFFSET_BITS = 40
UNFINISHED = ".new"

_segment_name = re.compile(r"(\d{6,})\.log")
_decoder = msgspec.msgpack.Decoder(Record)


class JournalDamaged(ValueError):
    """A record that was durable cannot be read; the text names file and offset, one line."""


class DiskFull(OSError):
    """The records since the last commit are not on the disk; they are kept, and `commit` can be tried again."""


class Place(NamedTuple):
    """Where a record begins."""

    segment: int
    offset: int

    def pack(self) -> int:
        """As one number of 64 bits: there may be millions of them."""
        return self.segment << OFFSET_BITS | self.offset

    @classmethod
    def unpack(cls, packed: int) -> "Place":
        return cls(packed >> OFFSET_BITS, packed & ((1 << OFFSET_BITS) - 1))


class JournalEntry(NamedTuple):
    """A record that was read. frames: read-only views, one a column; none for records without columns."""

    place: Place
    record: Record
    frames: tuple[Frame, ...]


class Journal:
    """The writing end; one process, one thread. `append` is cheap and promises nothing; `commit` makes durable."""

    def __init__(self, folder: Path, segment: int = 0) -> None:
        """Go on at the end of `segment`, which `recover` has left whole, or begin it. Raises: OSError."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[Frame] = []
        self._pending_bytes = 0
        self._writing: list[Frame] = []
        self._writing_bytes = 0
        self._open(segment, segment_path(folder, segment))
        sync_folder(folder)

    def _open(self, segment: int, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._synced = os.fstat(self._file).st_size
        self._pending_bytes = 0
        self.segment = segment
        if self._synced < len(MAGIC):
            self._synced = 0
            self._add([MAGIC])
            self.commit()

    @property
    def pending_bytes(self) -> int:
        """Appended, and not durable yet."""
        return self._writing_bytes + self._pending_bytes

    @property
    def segment_bytes(self) -> int:
        return self._synced + self.pending_bytes

    def append(self, record: Record, frames: Sequence[Frame] = ()) -> Place:
        """Add a record; the frames must not change until it is committed. Raises: ValueError if it is too large."""
        header = encode_header(record)
        parts = [header, *frames]
        size = sum(memoryview(part).nbytes for part in parts)
        if size > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {size} bytes: at most {MAX_RECORD_BYTES} are allowed")
        place = Place(self.segment, self.segment_bytes)
        digest = xxhash.xxh3_64(HEAD.pack(size, len(header), self._synced, 0)[:-8], seed=place.offset)
        for part in parts:
            digest.update(part)
        self._add([HEAD.pack(size, len(header), self._synced, digest.intdigest()), *parts])
        return place

    def _add(self, parts: Sequence[Frame]) -> None:
        self._pending += parts
        self._pending_bytes += sum(memoryview(part).nbytes for part in parts)

    def commit(self) -> None:
        """Write and sync what was appended. Raises: DiskFull, with nothing lost and nothing half-written; OSError."""
        while self.begin():
            self.write()
            self.end()

    def begin(self) -> bool:
        """What was appended by now is what `write` will make durable, unless an earlier part is still to be written.

        Returns: False if there is nothing to write.
        """
        if not self._writing:
            self._writing, self._pending = self._pending, []
            self._writing_bytes, self._pending_bytes = self._pending_bytes, 0
        return bool(self._writing)

    def write(self) -> None:
        """Make it durable, perhaps in another thread while records are appended. Raises: as `commit`."""
        try:
            crash_point("before_write")
            self._write()
            crash_point("before_sync")
            os.fdatasync(self._file)
            # Hardly any of it is read again, and the next write is given these pages, not others that it would have to
            # be the first to touch: on a virtual machine that takes ten times as long.
            os.posix_fadvise(self._file, self._synced, self._writing_bytes, os.POSIX_FADV_DONTNEED)
            crash_point("after_sync")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.ftruncate(self._file, self._synced)
            raise DiskFull(error.errno, error.strerror, str(segment_path(self._folder, self.segment))) from None

    def end(self) -> None:
        """`write` has returned; call it where records are appended."""
        self._synced += self._writing_bytes
        self._writing, self._writing_bytes = [], 0

    def _write(self) -> None:
        parts, offset = [memoryview(part).cast("B") for part in self._writing if len(part)], self._synced
        while parts:
            written = os.pwritev(self._file, parts[:IOV_MAX], offset)
            offset += written
            crash_point("after_write")
            while parts and written >= parts[0].nbytes:
                written -= parts.pop(0).nbytes
            if written:
                parts[0] = parts[0][written:]

    def roll(self, records: Sequence[tuple[Record, Sequence[Frame]]] = ()) -> list[Place]:
        """Commit, and go on in a new segment that begins with these records: after a crash it has all of them, or is
        not there. Nothing may be being written. Returns: their places.

        Raises: DiskFull, with the old segment still in use.
        """
        self.commit()
        old_file, old_segment, old_synced = self._file, self.segment, self._synced
        path = segment_path(self._folder, old_segment + 1)
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            self._open(old_segment + 1, unfinished)
            places = [self.append(record, frames) for record, frames in records]
            self.commit()
        except DiskFull:
            if self._file != old_file:
                os.close(self._file)
            unfinished.unlink(missing_ok=True)
            self._file, self.segment, self._synced = old_file, old_segment, old_synced
            self._pending, self._pending_bytes, self._writing, self._writing_bytes = [], 0, [], 0
            raise
        unfinished.rename(path)
        sync_folder(self._folder)
        os.close(old_file)
        return places

    def read(self, place: Place) -> JournalEntry:
        """A record that is durable. Raises: JournalDamaged."""
        return read_record(self._folder, place)

    def drop_before(self, segment: int) -> None:
        """Delete the segments below this one, oldest first."""
        for number in segments(self._folder):
            if number < segment:
                segment_path(self._folder, number).unlink()

    def close(self) -> None:
        """Commit and close. Raises: DiskFull; the journal is closed either way."""
        try:
            self.commit()
        finally:
            os.close(self._file)


IOV_MAX = min(1024, os.sysconf("SC_IOV_MAX"))


def segment_path(folder: Path, segment: int) -> Path:
    return folder / f"{segment:06d}.log"


def segments(folder: Path) -> list[int]:
    """Numbers of the segments there are, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _segment_name.fullmatch(path.name)))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading


def recover(folder: Path) -> int:
    """Cut off what a crash tore from the last segment, and drop one that it was about to begin.

    Returns: the segment to go on with.

    Raises: JournalDamaged.
    """
    for unfinished in folder.glob(f"*.log{UNFINISHED}"):
        unfinished.unlink()
    numbers = segments(folder)
    if not numbers:
        return 0
    path = segment_path(folder, numbers[-1])
    with path.open("r+b") as file:
        data = _read(path)
        end = len(MAGIC) if data[: len(MAGIC)] == MAGIC else 0
        for entry_end, _ in _entries(path, numbers[-1], data, is_last=True):
            end = entry_end
        if end < len(data):
            file.truncate(end)
            os.fsync(file.fileno())
    return numbers[-1]


def read_journal(folder: Path) -> Iterator[JournalEntry]:
    """All records in their order, a segment in memory at a time; what a crash tore off the end is passed over.

    Where earlier segments are gone, it begins with the first that begins with a state: a crash may have come while they
    were being deleted.
    Raises: JournalDamaged where a record cannot be read that had been durable, or a segment is missing.
    """
    numbers = segments(folder)
    has_begun = numbers[:1] == [0]
    for position, number in enumerate(numbers):
        if number != numbers[0] + position:
            raise JournalDamaged(f"{segment_path(folder, number - 1)}: the segment is missing")
        path = segment_path(folder, number)
        for _, entry in _entries(path, number, _read(path), is_last=number == numbers[-1]):
            has_begun |= isinstance(entry.record, StateSaved)
            if not has_begun:
                break
            yield entry
    if numbers and not has_begun:
        raise JournalDamaged(f"{folder}: earlier segments are gone, and none of those left begins with a state")


def read_record(folder: Path, place: Place) -> JournalEntry:
    """One record. Raises: JournalDamaged."""
    path = segment_path(folder, place.segment)
    with path.open("rb") as file:
        file.seek(place.offset)
        head = file.read(HEAD.size)
        size = HEAD.unpack(head)[0] if len(head) == HEAD.size else 0
        payload = file.read(min(size, MAX_RECORD_BYTES))
    entry = _entry(place.segment, place.offset, memoryview(head + payload), 0)
    if entry is None:
        raise JournalDamaged(f"{path}: damaged at byte {place.offset}")
    return entry


def _read(path: Path) -> memoryview:
    return memoryview(path.read_bytes())


def _entries(path: Path, segment: int, data: memoryview, is_last: bool) -> Iterator[tuple[int, JournalEntry]]:
    """Each record with the offset behind it."""
    offset = len(MAGIC)
    if data[:offset] != MAGIC:
        if is_last and len(data) < offset:
            return  # the crash came as the segment was begun
        raise JournalDamaged(f"{path}: not a segment of a journal, it does not begin with {MAGIC.decode()!r}")
    while offset < len(data):
        entry = _entry(segment, offset, data, offset)
        if entry is None:
            if not is_last or offset < _synced_bytes(data, offset):
                raise JournalDamaged(f"{path}: damaged at byte {offset} of {len(data)}")
            return
        offset += HEAD.size + HEAD.unpack_from(data, offset)[0]
        yield offset, entry


def _entry(segment: int, offset: int, data: memoryview, at: int) -> JournalEntry | None:
    """The record whose place is `offset`, read from `data[at:]`; None where there is no whole record."""
    if not _is_record(offset, data, at):
        return None
    size, header_bytes, _, _ = HEAD.unpack_from(data, at)
    payload = data[at + HEAD.size : at + HEAD.size + size]
    try:
        record = decode_header(payload[:header_bytes], _decoder)
    except MalformedMessage as error:
        raise JournalDamaged(
            f"segment {segment}, byte {offset}: written by another version of Echelon? {error}"
        ) from None
    frames, start = [], header_bytes
    for num_bytes in frame_sizes(getattr(record, "columns", ())):
        frames.append(payload[start : start + num_bytes])
        start += num_bytes
    return JournalEntry(Place(segment, offset), record, tuple(frames))


def _is_record(offset: int, data: memoryview, at: int) -> bool:
    if len(data) - at < HEAD.size:
        return False
    size, header_bytes, _, checksum = HEAD.unpack_from(data, at)
    end = at + HEAD.size + size
    if not 0 < header_bytes <= size <= MAX_RECORD_BYTES or end > len(data):
        return False
    digest = xxhash.xxh3_64(data[at : at + HEAD.size - 8], seed=offset)
    digest.update(data[at + HEAD.size : end])
    return digest.intdigest() == checksum


def _synced_bytes(data: memoryview, start: int) -> int:
    """How much of a segment is known to have been durable, by what records behind `start` say. Looks at every byte."""
    if len(data) - start < HEAD.size:
        return 0
    tail = np.frombuffer(data, np.uint8)[start:]
    num = len(tail) - HEAD.size + 1
    sizes = _u32_at_every_byte(tail, 0, num)
    headers = _u32_at_every_byte(tail, 4, num)
    fits = (headers > 0) & (headers <= sizes) & (np.arange(num) + HEAD.size + sizes <= len(tail))
    synced = 0
    for index in np.flatnonzero(fits):
        offset = start + int(index)
        if _is_record(offset, data, offset):
            synced = max(synced, HEAD.unpack_from(data, offset)[2])
    return synced


def _u32_at_every_byte(tail: np.ndarray, shift: int, num: int) -> np.ndarray:
    """int64 [num]: the little-endian u32 that begins at each byte."""
    parts = [tail[shift + i : shift + i + num].astype(np.int64) << (8 * i) for i in range(4)]
    return parts[0] + parts[1] + parts[2] + parts[3]
