"""What cannot be trained on ends a whole run, with one line that says why, and leaves nothing running."""

from pathlib import Path

import pytest

from echelon.cli import FAILED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NO_NUMBER = """
def reward(sample):
    return {"ones": 1.0, "ratio": float("nan")}
"""
ALL_ALIKE = """
def reward(sample):
    return 0.25
"""


@pytest.mark.parametrize(
    ("reward", "settings", "says"),
    [
        (
            NO_NUMBER,
            (),
            "the reward failed for 5 groups in a row: reward 'recipe.py:reward' failed: returned "
            "{'ones': 1.0, 'ratio': nan}; expected finite numbers",
        ),
        (
            ALL_ALIKE,
            ("scheduling.drop_zero_variance=true", "scheduling.max_filtered=12"),
            "12 groups in a row (3 batches) were dropped, none kept: 12 by ZeroVarianceFilter; rewards were 0.25 to "
            "0.25, at most 0 apart within a group",
        ),
    ],
    ids=["reward that is no number", "groups that are all filtered out"],
)
def test_what_cannot_be_trained_on_ends_the_run(
    write_recipe, start_run, tmp_path: Path, reward: str, settings: tuple[str, ...], says: str
) -> None:
    run = start_run(write_recipe(tmp_path, reward=reward), tmp_path / "run", "eval.every=0", *settings)
    code, _, stderr = run.finish(120)
    assert code == FAILED
    assert says in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert run.rows() == []
    assert not list((run.folder / "checkpoints").glob("step-*"))
    assert run.survivors() == []
