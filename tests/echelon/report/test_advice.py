"""Advice: where its condition is planted it speaks, with its figure and the setting, and else it is silent."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from echelon.commands.run import MAX_ADVICE, advice_lines
from echelon.config import DataConfig, RunConfig
from echelon.progress import Progress
from echelon.report.advice import MIN_STEPS, Figures, advise
from echelon.settings import flatten

NUM_STEPS = 60
SETTINGS = {
    "max_staleness": 2,
    "batch_groups": 8,
    "rollout.workers": 2,
    "rollout.dtype": "float32",
    "bus.slow_fraction": 0.3,
    "draft.window_versions": 16,
    "rollout.gate.max_kl": 0.02,
}


def good_row(step: int) -> dict[str, Any]:
    """Nothing stands out, though everything is there to be looked at."""
    return {
        "step": step,
        "loss/policy": 0.0,
        "learner/wait_s": 0.1,
        "learner/step_s": 1.0,
        "bus/queued_groups": 4,
        "ledger/trained_groups": 8 * (step + 1),
        "ledger/stale_groups": step // 10,
        "ledger/filtered_groups": step,
        "ledger/failed_groups": 0,
        "advantage/zero_groups_fraction": 0.1,
        "rollout/truncated_fraction": 0.01,
        "gate/kl": 1e-5,
        "gate/refused_versions": 0,
        "loss/clip_fraction": 0.01,
        "mismatch/ess": 0.95,
        "mismatch/kl_lag0": 1e-6,
        "difficulty/selection_alarm": 0.0,
        "draft/acceptance": 0.5 + 0.05 * (step % 3),
    }


def figures(change: Callable[[dict[str, Any]], object] = lambda row: None, **more: Any) -> Figures:
    rows = [good_row(step) for step in range(NUM_STEPS)]
    for row in rows:
        change(row)
    return Figures(rows, SETTINGS | more.pop("settings", {}), **more)


def sets(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda row: row.update({name.replace("__", "/"): value for name, value in values.items()})


def falling(row: dict[str, Any]) -> None:
    if row["step"] > 30:
        row["draft/acceptance"] -= 0.3


def ahead(row: dict[str, Any]) -> None:
    row.update({"learner/wait_s": 0.0, "bus/queued_groups": 8})


PLANTED = {
    "learner waits": (
        figures(sets(learner__wait_s=1.0)),
        ["waits 50%", "rollout.workers, now 2", "max_staleness (now 2"],
    ),
    "synchronous": (
        figures(sets(learner__wait_s=1.0), settings={"max_staleness": 0}),
        ["waits 50%", "max_staleness=1", "rollout.workers"],
    ),
    "batches queue up": (figures(ahead), ["8 groups (1.0 batches)", "rollout.workers", "learner.ranks"]),
    "workers idle": (figures(sets(learner__wait_s=0.0), worker_idle=0.4), ["wait 40%", "learner.ranks"]),
    "stale": (figures(sets(ledger__stale_groups=60)), ["11% of the groups (60) went stale", "max_staleness (now 2)"]),
    "filtered": (figures(sets(ledger__filtered_groups=2000)), ["81%", "scheduling.curriculum"]),
    "failed": (figures(sets(ledger__failed_groups=20)), ["4%", "reward.timeout_s"]),
    "equal rewards": (figures(sets(advantage__zero_groups_fraction=0.9)), ["90%", "drop_zero_variance=true"]),
    "truncated": (figures(sets(rollout__truncated_fraction=0.5)), ["50%", "rollout.max_tokens"]),
    "slow workers": (
        figures(rates={"worker-0": 100.0, "worker-1": 101.0, "worker-2": 40.0, "worker-3": 99.0}),
        ["worker-2 is at 40%", "bus.slow_fraction (now 0.3)"],
    ),
    "refused": (
        figures(sets(gate__refused_versions=3, gate__kl=0.5)),
        ["3 versions", "0.5 nats", "rollout.gate.max_kl"],
    ),
    "clipped": (figures(sets(loss__clip_fraction=0.3)), ["30%", "learner.lr"]),
    "ess": (figures(sets(mismatch__ess=0.3)), ["0.30", "max_staleness (now 2)"]),
    "engines differ": (figures(sets(mismatch__kl_lag0=0.005)), ["0.005 nats", "learner.dtype"]),
    "selection": (figures(sets(difficulty__selection_alarm=1.0)), ["100% of the steps", "rollout.ahead"]),
    "acceptance": (figures(falling), ["55% to 25% after version 30", "draft.window_versions (now 16)"]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_and_nothing_else(name: str) -> None:
    planted, words = PLANTED[name]
    (advice,) = advise(planted)
    assert all(word in advice.text for word in words), advice.text
    assert "\n" not in advice.text and advice.text.endswith(".") and 0 < advice.weight <= 1


def test_a_good_run_gets_no_advice() -> None:
    assert advise(figures(rates={"a": 100.0, "b": 70.0, "c": 120.0}, worker_idle=0.2)) == []


@pytest.mark.parametrize(
    "change",
    [
        sets(learner__wait_s=0.3),
        sets(learner__wait_s=0.0),
        sets(ledger__stale_groups=20),
        sets(ledger__filtered_groups=400),
        sets(ledger__failed_groups=5),
        sets(advantage__zero_groups_fraction=0.4),
        sets(rollout__truncated_fraction=0.1),
        sets(loss__clip_fraction=0.15),
        sets(mismatch__ess=0.6),
        sets(mismatch__kl_lag0=5e-4),
        lambda row: row["step"] > 30 and row.update({"draft/acceptance": row["draft/acceptance"] - 0.1}),
        lambda row: row["step"] == 7 and row.update({"difficulty/selection_alarm": 1.0}),
        lambda row: [row.pop(name) for name in list(row) if name not in ("step", "loss/policy")],
        lambda row: row.update({name: None for name in row if name not in ("step", "loss/policy")}),
    ],
)
def test_what_lies_below_its_threshold_or_is_not_recorded_is_not_spoken_of(
    change: Callable[[dict[str, Any]], object],
) -> None:
    assert advise(figures(change)) == []


def test_dynamic_sampling_needs_no_hint_to_dynamic_sampling() -> None:
    dropping = {"scheduling.drop_zero_variance": True}
    assert advise(figures(sets(advantage__zero_groups_fraction=0.9), settings=dropping)) == []


@pytest.mark.parametrize("change", [sets(learner__wait_s=1.0), ahead])
def test_sides_that_take_turns_wait_for_each_other(change: Callable[[dict[str, Any]], object]) -> None:
    assert advise(figures(change)) and advise(figures(change, settings={"placement": "colocated"})) == []


def test_two_workers_cannot_be_told_apart() -> None:
    assert advise(figures(rates={"a": 100.0, "b": 10.0})) == []


def test_bfloat16_may_differ_more() -> None:
    assert advise(figures(sets(mismatch__kl_lag0=0.005), settings={"rollout.dtype": "bfloat16"})) == []


def test_a_run_of_few_steps_is_too_short_to_tell() -> None:
    rows = [good_row(step) | {"learner/wait_s": 9.0} for step in range(MIN_STEPS)]
    assert advise(Figures(rows[:-1], SETTINGS)) == [] and advise(Figures(rows, SETTINGS))


def test_the_slow_first_steps_are_left_out() -> None:
    assert advise(figures(lambda row: row["step"] < 3 and row.update({"learner/wait_s": 500.0}))) == []


def test_the_weightiest_come_first_and_a_run_ends_with_three_of_them() -> None:
    bad = figures(sets(learner__wait_s=1.0, ledger__stale_groups=60, mismatch__ess=0.1, loss__clip_fraction=0.3))
    weights = [advice.weight for advice in advise(bad)]
    assert len(weights) == 4 and weights == sorted(weights, reverse=True)
    progress = Progress(recipe="r", run_dir="d", steps=NUM_STEPS, max_staleness=2, rows=list(bad.rows))  # type: ignore[arg-type]
    progress.settings = flatten(msgspec.to_builtins(RunConfig(model="none", data=DataConfig(train="none"))))
    lines = advice_lines(progress)
    assert len(lines) == MAX_ADVICE == 3 and lines[0].startswith("advice: The effective sample size is 0.10")
