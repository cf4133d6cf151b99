"""Long series made short enough to draw: bins with their smallest, mean and largest value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from databus.codec import Array

MAX_BINS = 300
"""A chart is some 700 pixels wide: more points than that would only lie on each other."""


@dataclass(frozen=True)
class Series:
    """x, low, mean, high: [N], x ascending. per_bin: how many values the fullest bin has; 1: nothing was reduced."""

    x: Array
    low: Array
    mean: Array
    high: Array
    per_bin: int

    def __len__(self) -> int:
        return len(self.x)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """(steps, values) of the rows that have a finite number by that name; float64 [N] each."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def binned(x: Array, y: Array, max_bins: int = MAX_BINS) -> Series:
    """Neighbours of a series in bins of equal count. Args: x, y: [M], x ascending."""
    if len(x) <= max_bins:
        return Series(x, y, y, y, 1)
    starts = np.linspace(0, len(x), max_bins, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, len(x)))
    return Series(
        np.add.reduceat(x, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.add.reduceat(y, starts) / counts,
        np.maximum.reduceat(y, starts),
        int(counts.max()),
    )
