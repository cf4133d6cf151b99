"""metrics.jsonl must say what the journal says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_run import ScriptedRun

PLANTED: list[tuple[str, str, Callable[[list[dict[str, Any]]], Any]]] = [
    ("gone", "taken, but metrics.jsonl has no row of it", lambda rows: rows.pop()),
    ("gap", "the row after that of step 0 is of step 2", lambda rows: rows.pop(1)),
    ("twice", "the row after that of step 1 is of step 1", lambda rows: rows.insert(1, rows[1])),
    ("unknown", "has a row of it, but the journal does not", lambda rows: rows.append(rows[-1] | {"step": 4})),
    ("reward", "reward/mean 7.0, the journal 0.5", lambda rows: rows[2].update({"reward/mean": 7.0})),
    ("loss", "loss/policy 0.25, the journal 1.5", lambda rows: rows[1].update({"loss/policy": 0.25})),
    (
        "lag",
        "staleness/max_versions 1.0, the journal 0.0",
        lambda rows: rows[2].update({"staleness/max_versions": 1.0}),
    ),
    ("count", "ledger/trained_groups 5, the journal 6.0", lambda rows: rows[2].update({"ledger/trained_groups": 5})),
    ("length", "rollout/length_max None, the journal 3.0", lambda rows: rows[2].pop("rollout/length_max")),
    ("queue", "bus/queued_groups 9, the journal 0.0", lambda rows: rows[0].update({"bus/queued_groups": 9})),
]


@pytest.mark.parametrize(("message", "breaks"), [case[1:] for case in PLANTED], ids=[case[0] for case in PLANTED])
def test_planted_violation_is_named(message: str, breaks: Callable[[Any], Any], tmp_path: Path) -> None:
    run = ScriptedRun().steps(4)
    run.end()
    breaks(run.rows)
    first = run.audit(tmp_path / "run").violations[0]
    assert first.category == "metrics"
    assert message in first.message
    assert first.step is not None


def test_last_rows_may_be_missing_where_the_broker_was_killed(tmp_path: Path) -> None:
    run = ScriptedRun().steps(4)
    del run.rows[-2:]
    assert run.audit(tmp_path / "run").violations == ()


def test_a_last_row_of_an_evaluation_is_no_step(tmp_path: Path) -> None:
    run = ScriptedRun().steps(2)
    run.end()
    run.rows.append({"step": 2, "time_s": 1.0, "eval/accuracy": 0.5})
    assert run.audit(tmp_path / "run").violations == ()
