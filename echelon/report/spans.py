"""Stretches of time: who was busy when, exactly, whatever the resolution at which it is drawn."""

from dataclasses import dataclass

import numpy as np

from databus.codec import Array


@dataclass(frozen=True)
class Spans:
    """starts, ends: float64 [N], seconds; ascending and apart from one another."""

    starts: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.starts)

    def until(self, times: Array) -> Array:
        """How much of the spans lies before each time, seconds; of `times`' shape."""
        if not len(self.starts):
            return np.zeros_like(times)
        lengths = np.concatenate(([0.0], np.cumsum(self.ends - self.starts)))
        index = np.searchsorted(self.starts, times, side="right")  # spans that have begun
        last = np.maximum(index - 1, 0)
        inside = np.minimum(times, self.ends[last]) - self.starts[last]
        return np.where(index > 0, lengths[last] + inside, 0.0)

    def total(self) -> float:
        return float((self.ends - self.starts).sum())

    def gaps(self, start: float, end: float) -> "Spans":
        """What lies between them, from `start` to `end`."""
        starts, ends = np.append(start, self.ends), np.append(self.starts, end)
        starts, ends = np.maximum(starts, start), np.minimum(ends, end)
        return Spans(starts[ends > starts], ends[ends > starts])

    def within(self, other: "Spans") -> "Spans":
        """What of these lies in the other ones too."""
        edges = np.unique(np.concatenate((self.starts, self.ends, other.starts, other.ends)))
        middles = (edges[:-1] + edges[1:]) / 2
        both = self._covers(middles) & other._covers(middles)
        return merged(edges[:-1][both], edges[1:][both])

    def _covers(self, times: Array) -> Array:
        index = np.searchsorted(self.starts, times, side="right") - 1
        return (index >= 0) & (times < self.ends[index]) if len(self.starts) else np.zeros(len(times), bool)


def merged(starts: Array, ends: Array) -> Spans:
    """Any stretches, which may overlap, as spans. Those that end before they begin (a clock was set) are left out."""
    starts, ends = np.asarray(starts, np.float64), np.asarray(ends, np.float64)
    starts, ends = starts[ends > starts], ends[ends > starts]
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order]) if len(ends) else ends
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] > reach[:-1]
    is_last = np.append(is_first[1:], True)[: len(starts)]
    return Spans(starts[is_first], reach[is_last])


def shares(spans: Spans, edges: Array) -> Array:
    """[N]: which share of each of the N bins between [N + 1] ascending edges the spans fill."""
    return np.diff(spans.until(edges)) / np.diff(edges)
