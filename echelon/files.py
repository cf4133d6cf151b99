"""Small files that are complete or absent, and files of JSON lines that a reader may follow."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

_decoder = msgspec.json.Decoder(dict[str, Any])


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, and after a crash there is one of the two."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete rows of a file of JSON lines; none where there is no file. A torn last line is left out."""
    return RowFollower(path).new_rows()


def keep_rows_before(path: Path, step: int) -> None:
    """Drop the rows of `step` and later: a resumed run writes them again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] < step]
        write_atomically(path, b"".join(msgspec.json.encode(row) + b"\n" for row in kept))


def cut_torn_row(path: Path) -> None:
    """Drop what follows the last whole row, so that the next one does not run into it."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class NumberedRows:
    """Rows of a growing file of JSON lines by their number, without keeping them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = [0]
        """Where each row begins, and where the next one will."""

    def read(self, first: int, most: int) -> list[str]:
        """At most so many complete rows from number `first` on."""
        try:
            with self._path.open("rb") as file:
                self._look(file)
                last = min(first + most, len(self._offsets) - 1)
                if first >= last:
                    return []
                file.seek(self._offsets[first])
                content = file.read(self._offsets[last] - self._offsets[first])
        except FileNotFoundError:
            return []
        return content.decode().splitlines()

    def _look(self, file: BinaryIO) -> None:
        """For rows that have been written since."""
        if os.fstat(file.fileno()).st_size < self._offsets[-1]:  # a resumed run has cut it
            del self._offsets[1:]
        file.seek(self._offsets[-1])
        for line in file:
            if line.endswith(b"\n"):
                self._offsets.append(self._offsets[-1] + len(line))


class RowFollower:
    """Reads a growing file of JSON lines, each row once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Rows that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # a resumed run has cut it
                    self._offset = 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [_decoder.decode(line) for line in complete.splitlines() if line.strip()]
