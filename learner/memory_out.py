"""Versions in shared memory, where learner and workers are on one machine: a worker serves what lies there as it is."""

from collections.abc import Iterator

from learner.files_out import FilesOut
from learner.snapshot import Snapshot


class MemoryOut(FilesOut):
    """An `Outlet`: files of a file system in memory, never written again once they have their name. The supervisor
    removes the run's folder there when the run ends, or the next run does (`echelon.shared_memory`)."""

    scheme = "shm"
    whole_suffix = "raw"

    def _whole_parts(self, snapshot: Snapshot, data: memoryview) -> Iterator[bytes | memoryview]:
        yield data
