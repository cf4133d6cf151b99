"""`echelon audit`: its exit codes and what it says."""

import json
from pathlib import Path

import pytest
from scripted_run import ScriptedRun

from databus.journal import segment_path
from databus.records import StepTaken
from echelon.cli import main
from echelon.run_folder import RunFolder


@pytest.fixture
def run() -> ScriptedRun:
    run = ScriptedRun().steps(2)
    run.save()
    run.steps(1)
    run.end()
    return run


def test_a_good_run_is_summed_up(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run.write(tmp_path / "run")
    assert main(["audit", str(folder.path)]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.startswith("scripted keeps its promises: steps 0 to 2\n")
    assert "6 trained, 0 stale, 0 filtered, 0 failed, 0 completed, 0 leased, 0 expired" in stdout
    assert "36 trained, 36 of them with loss" in stdout
    assert "at most 0 versions, allowed are 1" in stdout
    assert stderr == ""


def test_json_has_all_figures(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run.write(tmp_path / "run")
    assert main(["audit", str(folder.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["violations"] == []
    assert (report["groups"]["trained"], report["tokens"], report["num_checkpoints"]) == (6, 36, 1)


def test_the_first_violation_is_named_and_json_has_all(
    run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    index = run.where(StepTaken)[1]
    run.records.insert(index + 1, run.records[index])
    run.rows.pop()
    folder = run.write(tmp_path / "run")
    assert main(["audit", str(folder.path)]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("echelon: trained_twice, segment 0, byte ")
    assert stderr.endswith("step 1: taken a second time (and 1 more: --json)\n")
    assert stderr.count("\n") == 1
    assert main(["audit", str(folder.path), "--json"]) == 1
    violations = json.loads(capsys.readouterr().out)["violations"]
    assert [(each["category"], each["step"]) for each in violations] == [("trained_twice", 1), ("metrics", 2)]


def test_damage_is_named_by_file_and_offset(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run.write(tmp_path / "run")
    segment = segment_path(folder.journal, 0)
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert main(["audit", str(folder.path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"echelon: damage: {segment}: damaged at byte ")
    assert stderr.count("\n") == 1


def test_a_missing_segment_is_named(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run.save()
    folder = run.write(tmp_path / "run")
    segment_path(folder.journal, 1).unlink()
    assert main(["audit", str(folder.path)]) == 1
    assert "000001.log: the segment is missing" in capsys.readouterr().err


def test_rows_that_are_no_json(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run.write(tmp_path / "run")
    folder.metrics_file.write_bytes(b"{\n" + folder.metrics_file.read_bytes())
    assert main(["audit", str(folder.path)]) == 1
    assert f"damage: {folder.metrics_file}: not lines of JSON objects" in capsys.readouterr().err


def refusal(folder: Path, capsys: pytest.CaptureFixture) -> str:
    assert main(["audit", str(folder)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    return stderr


def test_bad_input_is_one_line(run: ScriptedRun, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "is not a run's folder: it has no run.json" in refusal(tmp_path, capsys)
    folder = run.write(tmp_path / "run")
    with RunFolder(folder.path).locked():
        assert "is in use: audit the run once it has ended" in refusal(folder.path, capsys)
    for segment in folder.journal.iterdir():
        segment.unlink()
    assert "has no journal to audit" in refusal(folder.path, capsys)
