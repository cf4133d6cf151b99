"""How fast an engine is, from the leases of a run.

Its step takes a + b · (running sequences), and neither steps nor running sequences are written down. But when groups
came to a worker is, and how long their completions became, so the engine's model can be run on just that. It says how
many steps each group saw, and with how many sequences beside it, and the time that the group really took is linear in
both: least squares give a and b, the model is run again with these, until they stay. What a group spends beside the
engine is known, or counts as the engine's.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from databus.codec import Array
from echelon.config import RunConfig
from echelon.plan.contention import Contention, spans_of
from echelon.plan.costs import Costs
from echelon.plan.engine import EngineModel, EngineSpeed
from echelon.plan.trace import LeasedGroup, Trace
from echelon.report.spans import merged

ROUNDS = 12


class EngineFit:
    """Least squares over a run's groups, whose time is a · steps + b · sequence steps + what is beside the engine."""

    def __init__(self, config: RunConfig, trace: Trace, costs: Costs, shared: Contention) -> None:
        self._config = config
        self._trace = trace
        self._costs = costs
        self._shared = shared
        self._by_worker: dict[str, list[LeasedGroup]] = {}
        for group in sorted(trace.groups, key=lambda group: group.start):
            self._by_worker.setdefault(group.worker, []).append(group)
        self._times, self._factors = self._changes()
        self._work = np.concatenate(([0.0], np.cumsum(np.diff(self._times) * self._factors[:-1])))

    def solve(self) -> EngineSpeed:
        speed = self._guess()
        for _ in range(ROUNDS):
            rows, times = self._features(speed)
            step_s, sequence_s = non_negative(rows, times)
            # Half of the way: when a group is done decides who runs beside whom, and so what the next round finds.
            speed = replace(
                speed,
                step_s=max(1e-6, (speed.step_s + step_s) / 2),
                sequence_s=(speed.sequence_s + sequence_s) / 2,
            )
        return speed

    def _guess(self) -> EngineSpeed:
        """As if the engine were full all the time, half of a step in itself."""
        room = self._config.rollout.max_sequences
        tokens = sum(int(group.group.lengths.sum()) for group in self._trace.groups)
        seconds = sum(
            spans_of([(group.start, group.end) for group in groups]).total() for groups in self._by_worker.values()
        )
        drafted = self._costs.tokens_per_step
        step_s = max(1e-4, room * seconds * drafted / max(1, tokens))
        return EngineSpeed(step_s / 2, step_s / 2 / room, drafted)

    def _features(self, speed: EngineSpeed) -> tuple[Array, Array]:
        """(float64 [N, 2], float64 [N]): steps and sequence steps of each group; the time that it really took."""
        rows: list[tuple[float, float]] = []
        times: list[float] = []
        beside_s = self._costs.score_s + 2 * self._costs.bus_s
        for groups in self._by_worker.values():
            for index, steps, sequence_steps in self._run(groups, speed):
                rows.append((steps, sequence_steps))
                times.append(max(0.0, self._worked(groups[index]) - beside_s))
        return np.array(rows), np.array(times)

    def _run(self, groups: Sequence[LeasedGroup], speed: EngineSpeed) -> list[tuple[int, float, float]]:
        """(index of a group, steps, sequence steps that it saw) of an engine that gets these groups when they came."""
        rollout = self._config.rollout
        engine = EngineModel(speed, rollout.max_sequences, rollout.max_tokens)
        engine.set_factor(groups[0].start, 1.0)
        seen: list[tuple[int, float, float]] = []
        arrivals = [(group.start, index, math.nan) for index, group in enumerate(groups)]
        changes = zip(self._times.tolist(), self._factors.tolist(), strict=True)
        coming = sorted([*arrivals, *((time, -1, factor) for time, factor in changes if time > groups[0].start)])
        for time, index, factor in [*coming, (math.inf, -1, 1.0)]:
            while (end := engine.next_end()) <= time and end < math.inf:
                for ended in engine.take_ended(end):
                    steps, sequence_steps = (now - then for now, then in zip(engine.spent, ended.arrived, strict=True))
                    seen.append((int(ended.group_id), steps, sequence_steps))
            if index >= 0:
                group = groups[index]
                engine.add(time, str(index), group.group.lengths.tolist(), group.predicted)
            elif time < math.inf:
                engine.set_factor(time, factor)
        return seen

    def _worked(self, group: LeasedGroup) -> float:
        """Seconds of undisturbed work between a group's lease and its result, new weights left out."""
        before, after = np.interp([group.start, group.end], self._times, self._work)
        return float(after - before)

    def _changes(self) -> tuple[Array, Array]:
        """(times [N], factors [N]): how fast engines are from each time on, by who is at work; 0 for new weights."""
        costs, shared = self._costs, self._shared
        ends = np.array([step.taken + costs.bus_s + costs.sync_s for step in self._trace.steps])
        pauses = merged(ends - costs.pause_s, ends)
        times = np.unique(np.concatenate((shared.times, pauses.starts, pauses.ends)))
        factors = shared.factors[np.clip(np.searchsorted(shared.times, times, "right") - 1, 0, None)]
        is_paused = np.searchsorted(pauses.starts, times, "right") > np.searchsorted(pauses.ends, times, "right")
        return times, np.where(is_paused, 0.0, factors)


def non_negative(rows: Array, values: Array) -> tuple[float, float]:
    """Least squares with no coefficient below 0, scaled so that what it says of all rows together is what there was.

    Args: rows: [N, 2]. values: [N].
    """
    best, least = np.zeros(2), math.inf
    for chosen in ([0, 1], [0], [1]):
        found = np.zeros(2)
        found[chosen] = np.linalg.lstsq(rows[:, chosen], values, rcond=None)[0]
        error = float(((rows @ found - values) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = found, error
    best *= values.sum() / max(1e-9, float((rows @ best).sum()))
    return float(best[0]), float(best[1])
