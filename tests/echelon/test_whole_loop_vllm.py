"""The whole pipeline with real vLLM: steps are taken, weights change in flight, versions and numerics are right."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

STEPS = 4


@pytest.fixture(scope="module")
def finished(write_recipe, start_run, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("vllm")
    settings = (
        "rollout.engine=vllm",
        "rollout.context_tokens=256",
        "rollout.max_tokens=224",  # long completions: some are under way whenever a version comes
        f"learner.steps={STEPS}",
        "eval.every=2",
        "learner.lr=1e-4",
    )
    run = start_run(write_recipe(folder), folder / "run", *settings)
    code, _, stderr = run.finish(360)
    assert (code, stderr) == (0, ""), run.logs()
    return run


def test_all_steps_are_taken_within_the_bound(finished) -> None:
    steps = [row for row in finished.rows() if "loss/policy" in row]
    assert [row["step"] for row in steps] == list(range(STEPS))
    assert max(row["staleness/max_versions"] for row in steps) <= 2
    assert [row["step"] for row in finished.rows() if "eval/accuracy" in row] == [0, 2, 4]


def test_learner_agrees_with_vllm_about_the_same_version(finished) -> None:
    values = [row["mismatch/kl_lag0"] for row in finished.rows() if "mismatch/kl_lag0" in row]
    assert values and max(values) < 1e-4
    assert all(row["mismatch/ess"] > 0.9 for row in finished.rows() if "mismatch/ess" in row)


def test_weights_reach_the_engine(finished) -> None:
    steps = [row for row in finished.rows() if "loss/policy" in row]
    assert sum(row["weights/sent_bytes"] for row in steps) > 0
    assert any(row["weights/pause_s"] > 0 for row in steps)


def test_versions_of_a_sample_rise_and_stay_within_the_bound(finished) -> None:
    samples = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["versions"] == sorted(sample["versions"])
        assert all(0 <= sample["step"] - version <= 2 for version in sample["versions"])
    assert any(version > 0 for sample in samples for version in sample["versions"])


def test_nothing_is_left_of_it(finished) -> None:
    assert finished.survivors() == []
