"""What a fit finds, where it is known what there is to be found."""

import math

import numpy as np
import pytest
from msgspec.structs import replace
from planned import BY_HAND, make_config

from echelon.plan.contention import Contention
from echelon.plan.engine import EngineModel, EngineSpeed
from echelon.plan.engine_fit import EngineFit, non_negative
from echelon.plan.fit import fit_learner
from echelon.plan.trace import LearnerStep, LeasedGroup, Trace
from echelon.plan.workload import RecordedGroup

START = 1.7e9
"""Seconds since the epoch, as a journal has them."""


def engine_run(speed: EngineSpeed, beside_s: float, arrivals: list[tuple[float, list[int]]], room: int) -> Trace:
    """The leases that one engine would have had, groups of which came at these times."""
    engine, trace = EngineModel(speed, room, 1000), Trace()
    came = dict(enumerate(arrivals))

    def end_until(time: float) -> None:
        while (end := engine.next_end()) <= time and end < math.inf:
            for group in engine.take_ended(end):
                arrived, lengths = came[int(group.group_id)]
                recorded = RecordedGroup(1, np.array(lengths), np.ones(len(lengths), np.float32))
                trace.groups.append(LeasedGroup("w", START + arrived, START + end + beside_s, 0, (1,), recorded))

    for index, (time, lengths) in came.items():
        end_until(time)
        engine.add(time, str(index), lengths, 0)
    end_until(math.inf)
    trace.steps.append(LearnerStep(0, START, START + 1.0, 10))
    return trace


def test_an_engines_speed_is_found_from_its_leases() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1.0, 60))
    arrivals = [(float(time), rng.integers(5, 120, 4).tolist()) for time in times]
    trace = engine_run(EngineSpeed(0.012, 0.0007), 0.3, arrivals, room=32)
    costs = replace(BY_HAND, cores=0.0)
    config = make_config(max_sequences=32, group_size=4)
    step_s, sequence_s, beside_s = EngineFit(config, trace, costs, Contention(trace, costs)).solve()
    assert step_s == pytest.approx(0.012, rel=0.05)
    assert sequence_s == pytest.approx(0.0007, rel=0.1)
    assert beside_s == pytest.approx(0.3, abs=0.1)


def test_a_learners_step_is_found_by_its_tokens() -> None:
    steps = [
        LearnerStep(index, START + 100 * index, START + 100 * index + 2.0 + 0.001 * tokens, tokens)
        for index, tokens in enumerate([1, 5000, 9000, 7000, 6000])
    ]
    trace = Trace(steps=steps)
    train_s, train_token_s = fit_learner(steps, Contention(trace, replace(BY_HAND, cores=0.0)), publish_s=0.5)
    assert train_token_s == pytest.approx(0.001, rel=1e-3)
    assert train_s == pytest.approx(1.5, rel=1e-3)


def test_shared_cores_are_taken_out_of_what_was_measured() -> None:
    """Learner and worker at work at once on one core: each had half of it."""
    group = RecordedGroup(1, np.array([10]), np.ones(1, np.float32))
    trace = Trace(
        groups=[LeasedGroup("w", START, START + 10.0, 0, (1,), group)],
        steps=[LearnerStep(0, START + 4.0, START + 8.0, 10)],
    )
    shared = Contention(trace, replace(BY_HAND, cores=1.0))
    worked = np.diff(shared.work(np.array([START, START + 4.0, START + 8.0, START + 10.0])))
    assert worked.tolist() == pytest.approx([4.0, 2.0, 2.0])


def test_no_cost_is_below_zero() -> None:
    rows = np.array([[1.0, 2.0, 1.0], [2.0, 3.0, 1.0], [3.0, 7.0, 1.0], [4.0, 1.0, 1.0]])
    assert non_negative(rows, rows @ [2.0, 0.5, 3.0]) == pytest.approx((2.0, 0.5, 3.0))
    found = non_negative(rows, rows @ [2.0, -0.5, 3.0])
    assert min(found) >= 0
