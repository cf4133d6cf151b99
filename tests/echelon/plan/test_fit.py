"""What a fit finds, where it is known what there is to be found."""

import math

import numpy as np
import pytest
from msgspec.structs import replace
from planned import BY_HAND, make_config

from databus.chronicle import Chronicle
from databus.groups import Group
from databus.ledger import Entry
from databus.prompts import Prompt
from echelon.config import RunConfig
from echelon.plan.contention import Contention
from echelon.plan.costs import Costs
from echelon.plan.engine import EngineModel, EngineSpeed
from echelon.plan.engine_fit import EngineFit, non_negative
from echelon.plan.events import Events
from echelon.plan.fit import fit_costs, fit_learner
from echelon.plan.simulation import Simulation, simulate
from echelon.plan.trace import LearnerStep, LeasedGroup, Trace
from echelon.plan.workload import RecordedGroup, StatedLengths

START = 1.7e9
"""Seconds since the epoch, as a journal has them."""


def engine_run(speed: EngineSpeed, arrivals: list[tuple[float, list[int]]], room: int) -> Trace:
    """The leases that one engine would have had, groups of which came at these times."""
    engine, trace = EngineModel(speed, room, 1000), Trace()
    came = dict(enumerate(arrivals))

    def end_until(time: float) -> None:
        while (end := engine.next_end()) <= time and end < math.inf:
            for group in engine.take_ended(end):
                arrived, lengths = came[int(group.group_id)]
                recorded = RecordedGroup(1, np.array(lengths), np.ones(len(lengths), np.float32))
                trace.groups.append(LeasedGroup("w", START + arrived, START + end, 0, (1,), recorded))

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
    trace = engine_run(EngineSpeed(0.012, 0.0007), arrivals, room=32)
    costs = replace(BY_HAND, cores=0.0)
    config = make_config(max_sequences=32, group_size=4)
    speed = EngineFit(config, trace, costs, Contention(trace, costs)).solve()
    assert speed.step_s == pytest.approx(0.012, rel=0.05)
    assert speed.sequence_s == pytest.approx(0.0007, rel=0.1)


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


def test_no_cost_is_below_zero_and_all_together_come_out_right() -> None:
    rows = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 7.0], [4.0, 1.0]])
    assert non_negative(rows, rows @ [2.0, 0.5]) == pytest.approx((2.0, 0.5))
    values = rows @ [2.0, -0.5]
    found = non_negative(rows, values)
    assert min(found) >= 0
    assert (rows @ found).sum() == pytest.approx(values.sum())


class Recorder(Chronicle):
    """What a run's journal would say, as a trace, of a simulated one."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.trace = Trace()
        self._events = events
        self._leased: dict[str, tuple[str, float, int]] = {}

    def leased(self, entry: Entry, worker: str, predicted_tokens: int) -> None:
        self._leased[entry.group_id] = (worker, START + self._events.now, predicted_tokens)

    def take(self, group_id: str, group: Group) -> None:
        worker, start, predicted = self._leased[group_id]
        recorded = RecordedGroup(len(group.prompt_ids), group.lengths, group.rewards)
        prompt = tuple(group.prompt_ids.tolist())
        now = START + self._events.now
        self.trace.groups.append(LeasedGroup(worker, start, now, predicted, prompt, recorded))


def recorded_run(config: RunConfig, costs: Costs, steps: int) -> tuple[Trace, Simulation]:
    """A simulated run and what it leaves behind, cut off nowhere: it runs dry as a real one does."""
    config = replace(config, learner=replace(config.learner, steps=steps))
    simulation = Simulation(config, costs, StatedLengths(costs, 0))
    state = simulation._broker.state
    recorder = Recorder(simulation._events)
    state.chronicle = recorder
    taken = simulation._broker.results.take_in

    def take_in(entry: Entry, prompt: Prompt, group: Group) -> None:
        recorder.take(entry.group_id, group)
        taken(entry, prompt, group)

    simulation._broker.results.take_in = take_in
    simulation.run(steps, 1)
    recorder.trace.rows = [dict(row) | {"learner/publish_s": costs.publish_s} for row in simulation.rows]
    cut = START
    for index, step in enumerate(simulation.steps):
        cut = max(cut, START) + step.wait_s
        recorder.trace.steps.append(LearnerStep(index, cut, START + step.ended_s, step.tokens))
        cut = START + step.ended_s
    return recorder.trace, simulation


def test_a_plan_fitted_to_one_run_foretells_another() -> None:
    """Cores that are shared, lengths that differ, weights that take their time: what was put in comes out."""
    costs = replace(
        BY_HAND,
        step_s=0.02,
        sequence_s=0.0006,
        train_s=0.3,
        train_token_s=0.0008,
        publish_s=0.2,
        sync_s=0.4,
        pause_s=0.2,
        bus_s=0.005,
        cores=2.0,
        worker_cores=1.25,
        length_spread=0.7,
    )
    config = make_config(batch_groups=8, group_size=8, max_sequences=64, max_staleness=2)
    trace, _ = recorded_run(config, costs, steps=16)
    stated = replace(costs, step_s=1.0, sequence_s=1.0, train_s=9.0, train_token_s=9.0, publish_s=9.0, sync_s=9.0)
    fitted = fit_costs(config, trace, stated)
    for workers, bound in ((1, 0), (1, 2), (2, 0), (2, 2)):
        cell = replace(config, max_staleness=bound, rollout=replace(config.rollout, workers=workers))
        was, said = (simulate(cell, each, StatedLengths(each, 1), steps=20) for each in (costs, fitted))
        assert said.tokens_per_s == pytest.approx(was.tokens_per_s, rel=0.08)
        assert said.learner_idle == pytest.approx(was.learner_idle, abs=0.08)
        assert said.worker_idle == pytest.approx(was.worker_idle, abs=0.08)
