"""The journal: what was durable is read back or reported, what a crash tore off is cut, a full disk loses nothing."""

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from databus.codec import encode_columns
from databus.journal import (
    MAGIC,
    DiskFull,
    Journal,
    JournalDamaged,
    Place,
    read_journal,
    read_record,
    recover,
    segment_path,
    segments,
)
from databus.records import BrokerEnded, GroupCompleted, GroupLeased, Record, StateSaved

commits = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=5)
"""Groups of records that are committed together; a record is the length of its column."""


def leased(number: int) -> GroupLeased:
    return GroupLeased(group_id=f"g{number}", cursor=number, attempt=0, worker="worker-0")


def append(journal: Journal, number: int, length: int) -> Place:
    """A lease, or for a length above 0 a completed group with a column of so many entries."""
    if length == 0:
        return journal.append(leased(number))
    columns, frames = encode_columns({"token_ids": np.arange(length, dtype=np.int32)})
    return journal.append(GroupCompleted(group_id=f"g{number}", worker="worker-0", columns=columns), frames)


def write(folder: Path, lengths: list[list[int]]) -> tuple[list[int], list[int]]:
    """Returns: where each record ends, and where each commit ends."""
    journal = Journal(folder)
    ends, synced, number = [], [], 0
    for group in lengths:
        for length in group:
            append(journal, number, length)
            ends.append(journal.segment_bytes)
            number += 1
        journal.commit()
        synced.append(journal.segment_bytes)
    journal.close()
    return ends, synced


def records(folder: Path) -> list[Record]:
    return [entry.record for entry in read_journal(folder)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    place = append(journal, 0, 5)
    append(journal, 1, 0)
    journal.close()
    group, lease = read_journal(tmp_path)
    assert np.frombuffer(group.frames[0], np.int32)[:5].tolist() == [0, 1, 2, 3, 4]
    assert lease.record == leased(1)
    again = read_record(tmp_path, place)
    assert again.record == group.record and bytes(again.frames[0]) == bytes(group.frames[0])


@given(lengths=commits, data=st.data())
def test_a_torn_tail_is_cut(lengths: list[list[int]], data: st.DataObject) -> None:
    """Wherever a crash tears the file, the whole records before are kept, and writing goes on behind them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends, _ = write(folder, lengths)
        kept = data.draw(st.integers(0, ends[-1]))
        whole = records(folder)[: sum(end <= kept for end in ends)]
        os.truncate(segment_path(folder, 0), kept)
        assert records(folder) == whole
        journal = Journal(folder, recover(folder))
        journal.append(leased(99))
        journal.close()
        assert records(folder) == [*whole, leased(99)]


@given(lengths=commits, bit=st.integers(0, 7), data=st.data())
def test_a_flipped_bit_is_cut_or_reported(lengths: list[list[int]], bit: int, data: st.DataObject) -> None:
    """Below what the last record knows to be durable it is damage, which names the place; above it is a torn tail."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends, synced = write(folder, lengths)
        original = records(folder)
        at = data.draw(st.integers(0, ends[-1] - 1))
        known_durable = synced[-2] if len(synced) > 1 else len(MAGIC)
        path = segment_path(folder, 0)
        flip(path, at, bit)
        before = sum(end <= at for end in ends)
        begins = ends[before - 1] if before else len(MAGIC)
        if at < len(MAGIC):
            with pytest.raises(JournalDamaged, match="not a segment"):
                recover(folder)
        elif at < known_durable:
            with pytest.raises(JournalDamaged, match=f"{path}: damaged at byte {begins} of {ends[-1]}"):
                recover(folder)
        else:
            recover(folder)
            # A record behind the flipped one that was committed later would have made it damage.
            assert records(folder) == original[:before]
            assert path.stat().st_size == begins


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_torn_tail_of_an_earlier_segment_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    append(journal, 0, 0)
    journal.roll([(BrokerEnded(ok=True), ())])
    journal.close()
    os.truncate(segment_path(tmp_path, 0), segment_path(tmp_path, 0).stat().st_size - 1)
    with pytest.raises(JournalDamaged, match="damaged at byte 16"):
        records(tmp_path)


def saved(step: int) -> StateSaved:
    return StateSaved(step=step, next_cursor=0, num_leases=0, pending=(), counts={}, groups=(), num_copies=0)


def test_roll_begins_with_its_head_and_old_segments_can_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        append(journal, number, 0)
        journal.roll([(saved(number), ()), (leased(10 + number), ())])
    assert segments(tmp_path) == [0, 1, 2, 3]
    journal.drop_before(2)
    journal.close()
    assert segments(tmp_path) == [2, 3]
    assert records(tmp_path) == [saved(1), leased(11), leased(2), saved(2), leased(12)]
    segment_path(tmp_path, 2).rename(tmp_path / "000001.log")
    with pytest.raises(JournalDamaged, match=r"000002\.log: the segment is missing"):
        records(tmp_path)


@pytest.mark.parametrize("wrote", [0, 5, 16, 60])
def test_a_segment_that_a_crash_left_unfinished_is_not_there(tmp_path: Path, wrote: int) -> None:
    write(tmp_path, [[0]])
    (tmp_path / "000001.log.new").write_bytes((MAGIC + bytes(50))[:wrote])
    assert records(tmp_path) == [leased(0)]
    assert recover(tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["000000.log"]


def test_a_crash_while_old_segments_are_deleted(tmp_path: Path) -> None:
    """One that was begun for its size alone is of no use without those before it."""
    journal = Journal(tmp_path)
    append(journal, 0, 0)
    journal.roll()
    append(journal, 1, 0)
    journal.roll([(saved(1), ())])
    append(journal, 2, 0)
    journal.close()
    assert records(tmp_path) == [leased(0), leased(1), saved(1), leased(2)]
    segment_path(tmp_path, 0).unlink()
    assert records(tmp_path) == [saved(1), leased(2)]
    segment_path(tmp_path, 2).unlink()
    with pytest.raises(JournalDamaged, match="none of those left begins with a state"):
        records(tmp_path)


def test_a_record_is_not_read_at_another_place(tmp_path: Path) -> None:
    """As old blocks of a disk would have it: the same bytes, elsewhere."""
    write(tmp_path, [[0], [0]])
    path = segment_path(tmp_path, 0)
    data = path.read_bytes()
    first = (len(data) - len(MAGIC)) // 2
    path.write_bytes(data + data[len(MAGIC) : len(MAGIC) + first])
    recover(tmp_path)
    assert path.read_bytes() == data


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is taken back whole, and written once there is room."""
    journal = Journal(tmp_path)
    append(journal, 0, 0)
    journal.commit()
    append(journal, 1, 30)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", writes_a_part(os.pwritev))
        with pytest.raises(DiskFull):
            journal.commit()
    assert records(tmp_path) == [leased(0)]
    append(journal, 2, 0)
    journal.close()
    assert [record.group_id for record in records(tmp_path) if hasattr(record, "group_id")] == ["g0", "g1", "g2"]


def test_a_full_disk_leaves_the_old_segment_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    append(journal, 0, 0)
    journal.commit()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", writes_a_part(os.pwritev))
        with pytest.raises(DiskFull):
            journal.roll([(BrokerEnded(ok=True), ())])
    assert segments(tmp_path) == [0]
    append(journal, 1, 0)
    journal.close()
    assert records(tmp_path) == [leased(0), leased(1)]


def writes_a_part(real):
    """As a disk that fills up: ten bytes go in, then no more."""
    calls = 0

    def pwritev(file: int, parts: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, [parts[0][:10]], offset)

    return pwritev


def test_another_fault_of_the_disk_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    """A limit on the size of files raises EFBIG."""
    journal = Journal(tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        append(journal, 0, 0)
        with pytest.raises(OSError, match="File too large") as caught:
            journal.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not isinstance(caught.value, DiskFull)
    journal.close()
    assert records(tmp_path) == [leased(0)]


def test_an_empty_folder_begins_at_segment_0(tmp_path: Path) -> None:
    assert recover(tmp_path / "journal") == 0
    assert records(tmp_path / "journal") == []
