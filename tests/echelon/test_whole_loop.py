"""The whole pipeline over real ZeroMQ: broker, worker with the small engine, learner."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echelon.metrics import REQUIRED
from echelon.rollout_record import read_rollouts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
GROUPS = 4


def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "loss/policy" in row]


def echelon(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echelon", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def finished(write_recipe, start_run, tmp_path_factory: pytest.TempPathFactory):
    """A run of six steps that went well: (run, stdout)."""
    folder = tmp_path_factory.mktemp("finished")
    run = start_run(write_recipe(folder), folder / "run", "learner.checkpoint_every=3", "draft.record=true")
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    return run, stdout


def test_every_step_has_its_row(finished) -> None:
    run, _ = finished
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in trained(rows):
        assert not set(REQUIRED) - row.keys()
    assert len(trained(rows)) == STEPS


def test_evaluations_are_those_that_were_asked_for(finished) -> None:
    run, _ = finished
    assert [row["step"] for row in run.rows() if "eval/accuracy" in row] == [0, 3, 6]


def test_no_token_is_older_than_the_bound(finished) -> None:
    run, _ = finished
    assert all(row["staleness/max_versions"] <= 2 for row in trained(run.rows()))


def test_the_ledger_adds_up(finished) -> None:
    run, _ = finished
    last = trained(run.rows())[-1]
    assert last["ledger/trained_groups"] == STEPS * GROUPS
    assert last["ledger/failed_groups"] == 0


def test_parts_of_the_reward_are_reported(finished) -> None:
    run, _ = finished
    row = trained(run.rows())[0]
    assert row["reward/ones"] + row["reward/short"] == pytest.approx(row["reward/mean"], abs=1e-5)


def test_samples_are_kept(finished) -> None:
    run, _ = finished
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == set(range(STEPS))
    assert all(sample["prompt"].endswith("=") and sample["token_ids"] for sample in samples)


def test_rollouts_are_kept_where_that_is_asked_for(finished) -> None:
    run, _ = finished
    records = list(read_rollouts(run.folder / "rollouts.bin"))
    assert len(records) >= STEPS * GROUPS
    assert len({record.group_id for record in records}) == len(records)
    assert all(len(record.completions()) == 4 and record.epoch == record.cursor // 45 for record in records)


def test_output_is_plain_lines_and_a_table(finished) -> None:
    run, stdout = finished
    lines = stdout.splitlines()
    assert any(line.startswith("step 5/6  reward") for line in lines)
    assert "training" in lines
    assert "6 of 6 steps" in stdout
    assert f"echelon export {run.folder} OUT" in stdout
    assert "\x1b" not in stdout


def test_nothing_is_left_of_it(finished) -> None:
    run, _ = finished
    assert run.survivors() == []


def test_checkpoint_and_export(finished, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    result = echelon("export", run.folder, tmp_path / "out", "--step", "3")
    assert (result.returncode, result.stderr) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1+2=")["input_ids"] == [4, 13, 5, 14]


def test_export_says_what_there_is(finished, tmp_path: Path) -> None:
    run, _ = finished
    result = echelon("export", run.folder, tmp_path / "out", "--step", "5")
    assert result.returncode == 2
    assert "has no step-000005: there are step-000003, step-000006" in result.stderr


def test_watching_a_finished_run_shows_its_table(finished) -> None:
    run, _ = finished
    result = echelon("watch", run.folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert "6 of 6 steps" in result.stdout


def test_a_finished_run_is_neither_overwritten_nor_resumed_without_steps_to_go(finished) -> None:
    run, _ = finished
    recipe = run.folder.parent / "small_recipe.py"
    again = echelon("run", recipe, "--run-dir", run.folder)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    resumed = echelon("run", recipe, "--run-dir", run.folder, "--resume")
    assert resumed.returncode == 2
    assert "is finished after 6 steps: to go on, raise learner.steps" in resumed.stderr


def test_on_policy_run_stopped_by_ctrl_c_and_resumed(write_recipe, start_run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    settings = ("max_staleness=0", "learner.checkpoint_every=1", "eval.every=0", "learner.steps=5")
    run = start_run(recipe, tmp_path / "run", *settings, "learner.steps=1000")
    run.wait_for(lambda: len(run.rows()) >= 2)
    run.process.send_signal(signal.SIGINT)
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (130, "")
    assert "go on from step-" in stdout
    assert run.survivors() == []
    done = len(run.rows())

    resumed = start_run(recipe, tmp_path / "run", *settings, f"learner.steps={done + 3}", "--resume")
    code, stdout, stderr = resumed.finish()
    assert (code, stderr) == (0, ""), resumed.logs()
    rows = resumed.rows()
    assert [row["step"] for row in rows] == list(range(done + 3))
    assert all(row["staleness/max_versions"] == 0 for row in rows)
    # Both sides have the same weights, and no sequence was under way while they changed.
    assert max(row["mismatch/kl"] for row in rows) < 1e-4
    assert rows[-1]["ledger/trained_groups"] == GROUPS * (done + 3)


def test_one_of_two_ranks_is_killed(write_recipe, start_run, tmp_path: Path) -> None:
    """torchrun ends the other one; both come back and go on."""
    settings = ("learner.ranks=2", "learner.checkpoint_every=1", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2)
    second = next(rank for rank in run.ranks() if rank.environ()["RANK"] == "1")
    os.kill(second.pid, signal.SIGKILL)
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    assert "learner was killed by SIGKILL" in stdout
    assert [row["step"] for row in run.rows()] == list(range(STEPS))
    assert run.survivors() == []
