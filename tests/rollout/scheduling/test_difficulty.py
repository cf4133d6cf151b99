import msgspec
import numpy as np
import pytest

from rollout.scheduling.difficulty import ANCHOR_GROUPS, DifficultyModel, DifficultyState
from rollout.scheduling.length_prior import LengthPrior

PASSED = np.array([True, False])


def observe(model: DifficultyModel, problem: int, lengths: list[int], passes: int = 0) -> None:
    model.observe(problem, np.array(lengths, np.int32), np.arange(len(lengths)) < passes)


def test_nothing_is_known_before_the_first_group() -> None:
    model = DifficultyModel(np.array([5, 6]), 0.5)
    assert not model.seen
    assert model.mean_tokens(np.arange(2)).tolist() == [0, 0]
    assert model.pass_rate(np.arange(2)).tolist() == [0.5, 0.5]


def test_one_group_alone_predicts_its_own_lengths_and_the_rest() -> None:
    model = DifficultyModel(np.array([5, 6]), 0.5)
    observe(model, 0, [10, 30], passes=1)
    seen, unseen = model.mean_tokens(np.arange(2))
    assert seen == pytest.approx(20)
    assert unseen == pytest.approx(20), "nothing else is known of the data set"
    assert model.longest_tokens(np.array([0]))[0] == pytest.approx(30)
    assert 20 < model.upper_tokens(np.array([0]))[0] < 30


def test_an_unseen_problem_is_predicted_from_its_prompt() -> None:
    prompts = np.array([4, 8, 16, 32, 64])
    model = DifficultyModel(prompts, 0.5)
    rng = np.random.default_rng(0)
    for _ in range(60):
        problem = int(rng.choice([0, 1, 3]))
        observe(model, problem, [int(5 * prompts[problem])] * 8)
    predicted = model.mean_tokens(np.array([2, 4]))
    np.testing.assert_allclose(predicted, [80, 320], rtol=0.15)


def test_newer_groups_count_for_more() -> None:
    model = DifficultyModel(np.array([5] * 4), 0.5)
    for _ in range(4):
        observe(model, 0, [100] * 8, passes=0)
    for _ in range(4):
        observe(model, 0, [25] * 8, passes=8)
    assert model.pass_rate(np.array([0]))[0] > 0.8
    assert model.evidence(np.array([0]))[0] == pytest.approx(8 * (1 - 0.5**8) / 0.5)
    assert model.mean_tokens(np.array([0]))[0] < 60


def test_a_policy_that_shortens_its_answers_shortens_predictions_of_problems_not_seen_since() -> None:
    rng = np.random.default_rng(0)
    model = DifficultyModel(np.full(400, 20), 0.5)
    scale = rng.lognormal(0, 0.5, 400)
    for problem in range(400):
        observe(model, problem, [int(200 * scale[problem])] * 4)
    before = model.mean_tokens(np.array([7]))[0]
    for _ in range(8):
        for problem in range(200, 400):
            observe(model, problem, [int(100 * scale[problem])] * 4)
    after = model.mean_tokens(np.array([7]))[0]
    assert after == pytest.approx(before / 2, rel=0.15)


def test_pass_rate_is_the_mean_of_the_beta_posterior() -> None:
    """By hand: the data set's rate is (3 + 1) / (4 + 2); it counts as two completions."""
    model = DifficultyModel(np.array([5]), 1.0)
    observe(model, 0, [1, 1, 1, 1], passes=3)
    assert model.pass_rate(np.array([0]))[0] == pytest.approx((3 + 2 * 4 / 6) / 6)


def test_ten_thousand_problems_are_small_and_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    model = DifficultyModel(rng.integers(1, 500, 10_000), 0.5)
    for problem in rng.integers(10_000, size=500):
        observe(model, int(problem), rng.integers(0, 900, 8).tolist(), passes=3)
    encoded = msgspec.msgpack.encode(model.save())
    assert len(encoded) < 300_000
    again = DifficultyModel(np.exp(model.log_prompt), 0.5)
    again.load(msgspec.msgpack.decode(encoded, type=DifficultyState))
    everything = np.arange(10_000)
    for method in ("mean_tokens", "upper_tokens", "longest_tokens", "pass_rate", "evidence"):
        np.testing.assert_allclose(getattr(again, method)(everything), getattr(model, method)(everything), rtol=1e-12)
    observe(again, 3, [4], passes=1)  # what was loaded can be written to
    assert np.isfinite(again.mean_tokens(everything)).all()


def test_state_of_another_data_set_is_refused() -> None:
    state = DifficultyModel(np.array([5, 6]), 0.5).save()
    with pytest.raises(ValueError, match=r"difficulty of 2 problems, data\.train has 3: resume with the same problems"):
        DifficultyModel(np.array([5, 6, 7]), 0.5).load(state)


def test_prior_forgets() -> None:
    prior = LengthPrior(memory_groups=10)
    for log_mean in [3.0] * 50 + [5.0] * 50:
        prior.observe(1.0, log_mean, 0.2, 0.4)
    assert prior.log_mean(np.array([1.0]))[0] == pytest.approx(5.0, abs=0.02)
    assert prior.spread() == (pytest.approx(0.2), pytest.approx(0.4))


def test_lengths_stay_known_when_they_become_relative() -> None:
    """Problems seen before the data set's expectation was steady, some of them among the very first."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.8, 2 * ANCHOR_GROUPS).astype(int) + 5
    model = DifficultyModel(rng.integers(5, 50, len(lengths)), 0.5)
    for problem, length in enumerate(lengths.tolist()):
        observe(model, problem, [length] * 8)
        known = np.arange(problem + 1)
        errors = model.mean_tokens(known) / lengths[known] - 1
        assert np.median(np.abs(errors)) < 0.2, problem
