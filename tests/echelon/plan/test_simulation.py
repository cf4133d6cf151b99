"""Simulated runs against runs worked by hand, and against the bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from planned import BY_HAND, make_config

from databus.config import StalePolicy
from echelon.config import RunConfig
from echelon.plan.costs import Costs
from echelon.plan.simulation import Outcome, Simulation, simulate
from echelon.plan.workload import StatedLengths

BATCH_TOKENS = 4 * 2 * 100


def run(config: RunConfig, costs: Costs = BY_HAND, steps: int = 12) -> Outcome:
    outcome = simulate(config, costs, StatedLengths(costs, 0), steps=steps)
    assert not outcome.failure
    return outcome


def test_without_staleness_both_sides_take_turns() -> None:
    outcome = run(make_config(max_staleness=0))
    assert outcome.tokens_per_s == pytest.approx(BATCH_TOKENS / (10 + 6))
    assert outcome.learner_idle == pytest.approx(10 / 16)
    assert outcome.worker_idle == pytest.approx(6 / 16)
    assert (outcome.staleness_mean, outcome.staleness_max, outcome.dropped) == (0, 0, 0)


def test_a_slow_learner_never_waits() -> None:
    """Three batches at once in the engine, for which all of them together take 10 s: they wait for the learner."""
    outcome = run(make_config(max_staleness=2))
    assert outcome.tokens_per_s == pytest.approx(BATCH_TOKENS / 6)
    assert outcome.learner_idle == pytest.approx(0, abs=1e-9)
    assert outcome.staleness_max == 2


def test_a_slow_engine_never_waits() -> None:
    """Room for one batch: 10 s each, of which the learner takes 6."""
    outcome = run(make_config(max_staleness=2, max_sequences=8))
    assert outcome.tokens_per_s == pytest.approx(BATCH_TOKENS / 10)
    assert outcome.learner_idle == pytest.approx(4 / 10)
    assert outcome.worker_idle == pytest.approx(0, abs=1e-9)


def test_an_engine_with_room_for_half_a_batch_needs_twice_as_long() -> None:
    assert run(make_config(max_sequences=4)).tokens_per_s == pytest.approx(BATCH_TOKENS / (20 + 6))
    assert run(make_config(max_sequences=4, workers=2)).tokens_per_s == pytest.approx(BATCH_TOKENS / (10 + 6))


def test_what_it_takes_to_hand_weights_over_counts() -> None:
    """1 s to publish, 3 s to pull and apply, and on each of the ways between them a message."""
    costs = replace(BY_HAND, publish_s=1.0, sync_s=3.0, pause_s=0.5, score_s=2.0, bus_s=0.25)
    outcome = run(make_config(), costs)
    ways = 0.25 * 6  # published, announced, applied, leased, completed, the batch
    assert outcome.tokens_per_s == pytest.approx(BATCH_TOKENS / (6 + 1 + 3 + 10 + 2 + ways))


def test_a_pause_stops_what_is_generated() -> None:
    costs = replace(BY_HAND, sync_s=1.0, pause_s=1.0)
    paused, free = (run(make_config(max_staleness=2, max_sequences=8), each) for each in (costs, BY_HAND))
    assert paused.tokens_per_s == pytest.approx(BATCH_TOKENS / 11)
    assert free.tokens_per_s == pytest.approx(BATCH_TOKENS / 10)


def test_on_one_core_the_work_of_all_adds_up() -> None:
    costs = replace(BY_HAND, cores=1.0)
    outcome = run(make_config(max_staleness=2, max_sequences=8), costs, steps=40)
    assert outcome.tokens_per_s == pytest.approx(BATCH_TOKENS / (10 + 6), rel=0.02)
    assert run(make_config(max_staleness=0), costs).tokens_per_s == pytest.approx(BATCH_TOKENS / 16)


def test_evaluations_hold_up_new_versions() -> None:
    """Every step's version is evaluated, for 10 s, before anything newer is served."""
    costs = replace(BY_HAND, eval_problems=4)
    outcome = run(make_config(eval_every=1), costs)
    assert outcome.steps_per_s < 1 / 16
    assert run(make_config(eval_every=0), costs).steps_per_s == pytest.approx(1 / 16)


@given(
    max_staleness=st.integers(0, 4),
    policy=st.sampled_from(["drop", "mask", "requeue"]),
    workers=st.integers(1, 4),
    batch_groups=st.integers(1, 6),
    max_sequences=st.integers(1, 40),
    train_s=st.floats(0.1, 30),
    sync_s=st.floats(0, 20),
    spread=st.floats(0, 1.5),
)
@settings(max_examples=40, deadline=None)
def test_no_batch_breaks_the_bound(
    max_staleness: int,
    policy: StalePolicy,
    workers: int,
    batch_groups: int,
    max_sequences: int,
    train_s: float,
    sync_s: float,
    spread: float,
) -> None:
    config = make_config(
        workers=workers,
        max_staleness=max_staleness,
        batch_groups=batch_groups,
        max_sequences=max_sequences,
        stale_policy=policy,
    )
    costs = replace(BY_HAND, train_s=train_s, sync_s=sync_s, pause_s=min(1.0, sync_s), length_spread=spread)
    simulation = Simulation(config, costs, StatedLengths(costs, 0))
    outcome = simulation.run(steps=10, first=2)
    assert not outcome.failure
    assert len(simulation.rows) >= 10
    assert all(0 <= row["staleness/max_versions"] <= max_staleness for row in simulation.rows)
    trained = [row["ledger/trained_groups"] for row in simulation.rows]
    assert trained == [batch_groups * (index + 1) for index in range(len(trained))]


def test_ten_thousand_workers_are_simulated_to_the_end() -> None:
    costs = replace(BY_HAND, length_mean=20.0, length_spread=0.5)
    outcome = run(make_config(workers=10_000, max_staleness=1, batch_groups=1000, max_sequences=4), costs, steps=4)
    assert outcome.steps == 1
    assert outcome.groups_per_s > 100


def test_a_run_that_would_end_says_why() -> None:
    config = make_config()
    scheduling = replace(config.scheduling, drop_zero_variance=True, max_filtered=5)
    costs = replace(BY_HAND, pass_rate=1.0)
    outcome = simulate(replace(config, scheduling=scheduling), costs, StatedLengths(costs, 0), steps=8)
    assert outcome.failure.startswith("5 groups in a row")


def test_a_run_without_progress_is_ended_by_its_watchdog() -> None:
    costs = replace(BY_HAND, train_s=1e6)
    outcome = simulate(make_config(), costs, StatedLengths(costs, 0), steps=8)
    assert outcome.failure == "no progress for 900 s (watchdog_s)"
