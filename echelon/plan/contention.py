"""Who was at work when in a run, and how fast everybody was for it."""

from collections.abc import Sequence

import numpy as np

from databus.codec import Array
from echelon.plan.cores import slowdown
from echelon.plan.costs import Costs
from echelon.plan.trace import Trace
from echelon.report.spans import Spans, merged


class Contention:
    """How fast everybody was at any time of a run, by who was at work then."""

    def __init__(self, trace: Trace, costs: Costs) -> None:
        workers: dict[str, list[tuple[float, float]]] = {}
        for group in trace.groups:
            workers.setdefault(group.worker, []).append((group.start, group.end))
        for worker, start, end in trace.lost:
            workers.setdefault(worker, []).append((start, end))
        spans = [(spans_of(pairs), costs.worker_cores) for pairs in workers.values()]
        spans.append((spans_of([(step.cut, step.taken) for step in trace.steps]), costs.learner_cores))
        self.times = np.unique(np.concatenate([np.concatenate((span.starts, span.ends)) for span, _ in spans]))
        wanted = np.zeros(len(self.times))
        for span, cores in spans:
            wanted[np.searchsorted(self.times, span.starts)] += cores
            wanted[np.searchsorted(self.times, span.ends)] -= cores
        self.factors = np.array([slowdown(costs.cores, each) for each in np.cumsum(wanted).clip(0)])
        lengths = np.diff(self.times) * self.factors[:-1]
        self._work = np.concatenate(([0.0], np.cumsum(lengths)))

    def work(self, times: Array) -> Array:
        """Seconds of undisturbed work that fit in before each time."""
        return np.interp(times, self.times, self._work)


def spans_of(pairs: Sequence[tuple[float, float]]) -> Spans:
    """Of (start, end), in any order."""
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return merged(array[:, 0], array[:, 1])
