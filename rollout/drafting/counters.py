"""What drafting has done, in a page of memory that the engine's process writes and the rollout worker reads.

They are different processes, and asking the engine would cost a step. The page holds one little-endian float64 a
field, in the order of `FIELDS`, each a total since the engine's start. An aligned float64 is written at once, so a
reader may see counters of two neighbouring steps but no half of one.
"""

import mmap
import os
from collections.abc import Mapping
from typing import Final

import numpy as np

SOURCES: Final = ("own", "sibling", "epoch", "common")
"""Where a draft token came from: the request itself, its group, earlier completions of the problem, other problems."""
LAGS: Final = (0, 1, 2, 4, 8, 16)
"""The least age, in policy versions, of each class of draft tokens."""

_KINDS = (*SOURCES, *(f"lag{lag}" for lag in LAGS))

FIELDS: Final = (
    "rounds",  # times that a request's draft was verified
    "drafted",  # tokens
    "accepted",  # tokens
    "proposals",  # steps in which the drafter was asked
    "propose_s",  # time in the drafter
    "index_tokens",
    "index_bytes",
    "refused",  # requests or histories that the drafter did not take
    "failures",  # of the drafter itself; after one there are no drafts until the next policy version
    *(f"drafted_{kind}" for kind in _KINDS),
    *(f"accepted_{kind}" for kind in _KINDS),
)


class CounterPage:
    """The page, from either side."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._values = np.frombuffer(mmap.mmap(fd, len(FIELDS) * 8), "<f8")

    @classmethod
    def create(cls) -> "CounterPage":
        """In anonymous shared memory, all zeros. The reader's side."""
        fd = os.memfd_create("echelon-draft-counters")
        os.ftruncate(fd, len(FIELDS) * 8)
        return cls(fd)

    @classmethod
    def open(cls, path: str) -> "CounterPage":
        """The writer's side; `path` as the reader has it. Raises: OSError."""
        return cls(os.open(path, os.O_RDWR))

    @property
    def path(self) -> str:
        """Where another process of this machine finds it, as long as this one lives and has not closed it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, totals: Mapping[str, float]) -> None:
        """Fields that `totals` lacks become 0; what is no field is left out."""
        self._values[:] = [totals.get(field, 0.0) for field in FIELDS]

    def read(self) -> dict[str, float]:
        return dict(zip(FIELDS, self._values.tolist(), strict=True))

    def close(self) -> None:
        """The page itself goes when both sides have let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
