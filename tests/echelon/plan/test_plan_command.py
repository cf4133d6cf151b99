"""`echelon plan`: what it prints, and what it says of bad input."""

import json
from pathlib import Path

import pytest

from echelon.cli import BAD_INPUT, main

RECIPE = """
from echelon.config import DataConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig


def reward(sample):
    return 1.0


def recipe():
    return RunConfig(
        model="some/model",
        data=DataConfig(train="some/data"),
        reward=RewardConfig(function=f"{__file__}:reward"),
        group_size=4,
        batch_groups=4,
        rollout=RolloutConfig(max_sequences=32, context_tokens=256, max_tokens=64),
        learner=LearnerConfig(steps=6),
    )
"""
FEW = ("--workers", "1,2", "--staleness", "0,1", "--steps", "6")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "some_recipe.py"
    file.write_text(RECIPE)
    return file


def test_a_plan_without_a_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), *FEW, "assume.cores=0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(cell["workers"], cell["max_staleness"]) for cell in plan["cells"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(cell["tokens_per_s"] > 0 and not cell["failure"] for cell in plan["cells"])
    assert plan["recommended"] in plan["cells"]
    assert plan["why"].startswith(f"{plan['recommended']['workers']} worker")
    assert (plan["run"], plan["fitted"]) == (None, [])
    assert plan["costs"]["cores"] == 0


def test_the_table_names_what_was_taken_for_granted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), *FEW, "assume.train_s=2.5", "group_size=8"]) == 0
    said = capsys.readouterr().out
    assert "from stated costs alone" in said
    assert "assume.train_s=2.5" in said
    assert said.count("│") > 4 * 10


def test_a_run_that_would_end_is_an_answer_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["assume.pass_rate=1", "scheduling.drop_zero_variance=true", "scheduling.max_filtered=8"]
    assert main(["plan", str(recipe), *FEW, *words]) == 1
    said = capsys.readouterr().out
    assert "would end: 8 groups in a row" in said
    assert "every one of these runs would end early" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("/no/such/run",), "no such run folder: /no/such/run"),
        (("--from", "/no/such/run"), "no such run folder: /no/such/run"),
        (("here", "there"), "'here' and 'there': a plan is fitted to one run, and settings are section.key=value"),
        (("placement=colocated",), "placement is colocated: a plan is of learner and workers on devices of their own"),
        (("rollout.wrkers=2",), "unknown setting 'rollout.wrkers'"),
        (("assume.step=2",), "unknown setting 'assume.step' (assume has: step_s, "),
        (("assume.step_s=0",), "assume.step_s=0: expected a number above 0"),
        (("assume.problems=many",), "assume.problems=many: expected a whole number at least 1"),
        (("--workers", "0"), "expected whole numbers from 1, with commas between them, got '0'"),
        (("--staleness", "1,x"), "expected whole numbers from 0, with commas between them, got '1,x'"),
        (("--steps", "3"), "expected a whole number from 4, got '3'"),
    ],
)
def test_bad_input_is_one_line(
    recipe: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["plan", str(recipe), *words]) == BAD_INPUT
    except SystemExit as ended:  # argparse's own
        assert ended.code == BAD_INPUT
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_a_folder_without_steps_is_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), str(tmp_path)]) == BAD_INPUT
    assert "is not a run's folder: it has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"run_id": "r", "recipe": "some_recipe"}')
    assert main(["plan", str(recipe), str(tmp_path)]) == BAD_INPUT
    assert capsys.readouterr().err == (f"echelon: {tmp_path} has 0 steps in metrics.jsonl: a plan needs at least 3\n")
    rows = [{"step": step, "loss/policy": 0.0} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plan", str(recipe), str(tmp_path)]) == BAD_INPUT
    assert "has no journal of a whole step with times" in capsys.readouterr().err
