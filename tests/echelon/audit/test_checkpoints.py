"""Checkpoints must be whole, and their positions those of the journal."""

from pathlib import Path

import msgspec
import pytest
from scripted_run import ScriptedRun

from databus.records import StateSaved
from echelon.audit.run import audit_run
from echelon.audit.violation import Violation
from echelon.run_folder import RunFolder


@pytest.fixture
def run() -> ScriptedRun:
    run = ScriptedRun().steps(2)
    run.save()
    run.steps(2)
    run.save()
    run.end()
    return run


def the_violation(folder: RunFolder) -> Violation:
    (violation,) = audit_run(folder).violations
    assert violation.category == "checkpoint"
    return violation


def test_whole_checkpoints_pass(run: ScriptedRun, tmp_path: Path) -> None:
    report = run.audit(tmp_path / "run")
    assert (report.violations, report.num_checkpoints) == ((), 2)


def test_changed_file(run: ScriptedRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run")
    (folder.checkpoints / "step-000004" / "weights").write_bytes(b"some wEights")
    assert "the contents of weights have changed" in the_violation(folder).message


def test_changed_file_of_one_of_the_best(run: ScriptedRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run")
    best = folder.checkpoints / "best"
    best.mkdir()
    (folder.checkpoints / "step-000002").rename(best / "step-000002")
    report = audit_run(folder)
    assert (report.violations, report.num_checkpoints) == ((), 2)
    (best / "step-000002" / "weights").write_bytes(b"some wEights")
    assert "best/step-000002 is damaged: the contents of weights have changed" in the_violation(folder).message


def test_missing_file(run: ScriptedRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run")
    (folder.checkpoints / "step-000002" / "weights").unlink()
    assert "weights is missing" in the_violation(folder).message


def test_checkpoint_under_another_name(run: ScriptedRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "run")
    (folder.checkpoints / "step-000002").rename(folder.checkpoints / "step-000003")
    assert the_violation(folder).message == "step-000003 says that it is of step 2"


def test_checkpoint_beyond_the_journal(run: ScriptedRun, tmp_path: Path) -> None:
    run.positions[9] = msgspec.structs.replace(run.positions[4], step=9)
    violation = the_violation(run.write(tmp_path / "run"))
    assert (violation.step, violation.message) == (9, "a checkpoint after 9 steps, the journal has 4")


@pytest.mark.parametrize("change", [{"next_cursor": 9}, {"pending": ((0, 1),)}, {"counts": {"trained": 3}}])
def test_position_that_differs(change: dict, run: ScriptedRun, tmp_path: Path) -> None:
    run.positions[2] = msgspec.structs.replace(run.positions[2], **change)
    (name,) = change
    violation = the_violation(run.write(tmp_path / "run"))
    assert violation.step == 2
    assert violation.message.startswith(name)


def test_position_whose_segment_is_gone_is_not_compared(run: ScriptedRun, tmp_path: Path) -> None:
    assert len(run.where(StateSaved)) == 2
    run.positions[2] = msgspec.structs.replace(run.positions[2], next_cursor=9)
    assert run.audit(tmp_path / "run", drop_before=2).violations == ()
