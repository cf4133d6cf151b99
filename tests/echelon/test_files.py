from pathlib import Path

import pytest

from echelon.files import RowFollower, keep_rows_before, read_rows, write_atomically
from echelon.metrics import RowWriter


def test_rows_are_read_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    follower = RowFollower(file)
    assert follower.new_rows() == []
    file.write_text('{"step":0}\n{"st')
    assert follower.new_rows() == [{"step": 0}]
    with file.open("a") as stream:
        stream.write('ep":1}\n')
    assert follower.new_rows() == [{"step": 1}]
    assert follower.new_rows() == []


def test_a_file_that_was_cut_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step":0}\n{"step":1}\n')
    follower = RowFollower(file)
    follower.new_rows()
    keep_rows_before(file, 1)
    assert follower.new_rows() == [{"step": 0}]


def test_cutting_drops_later_rows_and_a_torn_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step":0}\n{"step":1}\n{"step":2}\n{"ste')
    keep_rows_before(file, 2)
    assert read_rows(file) == [{"step": 0}, {"step": 1}]
    assert file.read_bytes().endswith(b"\n")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "text")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_torn_row_is_dropped_before_the_next_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"step":0}\n{"ste')
    writer = RowWriter(file)
    writer.write({"step": 1})
    writer.close()
    assert read_rows(file) == [{"step": 0}, {"step": 1}]
