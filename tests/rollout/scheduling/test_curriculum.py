import logging

import numpy as np
import pytest

from rollout.config import DropSolved, LearningProgress, NoCurriculum, PassRateBand
from rollout.scheduling.curriculum import Curriculum, make_curriculum
from rollout.scheduling.difficulty import DifficultyModel

NUM = 60


def make_model() -> DifficultyModel:
    """Problems 0..19 are never solved, 20..39 half the time, 40..59 always; each was seen once with 16 completions."""
    model = DifficultyModel(np.full(NUM, 10), 0.5)
    for problem in range(NUM):
        model.observe(problem, np.full(16, 50), np.arange(16) < 8 * (problem // 20))
    return model


def pool(curriculum: Curriculum, number: int, seed: int = 0) -> list[int]:
    return curriculum.pool(number, np.random.default_rng([seed, number])).tolist()


def test_none_has_all() -> None:
    assert pool(make_curriculum(NoCurriculum(), make_model()), 3) == list(range(NUM))


def test_solved_problems_are_dropped_and_tried_again() -> None:
    curriculum = make_curriculum(DropSolved(threshold=0.9, retry_epochs=2), make_model())
    unsolved = list(range(40))
    assert pool(curriculum, 0) == unsolved
    assert pool(curriculum, 1) == unsolved
    assert pool(curriculum, 2) == list(range(NUM)), "2 epochs without them"
    assert pool(curriculum, 3) == unsolved


def test_band() -> None:
    curriculum = make_curriculum(PassRateBand(low=0.2, high=0.8), make_model())
    assert pool(curriculum, 0) == list(range(20, 40))


def test_little_evidence_is_not_enough() -> None:
    curriculum = make_curriculum(DropSolved(threshold=0.9, min_completions=17), make_model())
    assert pool(curriculum, 0) == list(range(NUM))


def test_a_curriculum_that_leaves_nothing_takes_all(caplog: pytest.LogCaptureFixture) -> None:
    curriculum = make_curriculum(PassRateBand(low=0.97, high=0.98), make_model())
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            assert pool(curriculum, number) == list(range(NUM))
    assert caplog.messages == ["the curriculum leaves no problem: taking all of them"]


def test_what_was_tried_is_remembered() -> None:
    config = DropSolved(threshold=0.9, retry_epochs=3)
    first, second = (make_curriculum(config, make_model()) for _ in range(2))
    pool(first, 0)
    second.load(first.save())
    for number in range(1, 6):
        assert pool(first, number) == pool(second, number)


def progressing(config: LearningProgress, groups: int = 400) -> Curriculum:
    """Short prompts never pass, long ones always do, those between are being learnt: their pass rate swings."""
    prompts = np.concatenate((np.full(100, 8), np.full(100, 40), np.full(100, 200)))
    model = DifficultyModel(prompts, 0.5)
    curriculum = make_curriculum(config, model)
    rng = np.random.default_rng(0)
    for turn in range(groups):
        problem = int(rng.integers(300))
        rate = (0.0, 0.2 + 0.6 * (turn % 2), 1.0)[problem // 100]
        model.observe(problem, np.full(8, 2 * prompts[problem]), np.arange(8) < 8 * rate)
        curriculum.observe(problem, rate)
    return curriculum


def test_learning_progress_draws_what_is_being_learnt() -> None:
    drawn = np.array(pool(progressing(LearningProgress(exploration=0.1, round_problems=3000)), 1))
    shares = np.bincount(drawn // 100, minlength=3) / len(drawn)
    assert shares[1] > 0.75
    assert shares[0] > 0.01 and shares[2] > 0.01, "exploration"


def test_exploration_alone_is_uniform() -> None:
    drawn = np.array(pool(progressing(LearningProgress(exploration=1.0, round_problems=3000)), 1))
    np.testing.assert_allclose(np.bincount(drawn // 100) / len(drawn), 1 / 3, atol=0.05)


def test_learning_progress_begins_uniformly() -> None:
    drawn = pool(progressing(LearningProgress(round_problems=120), groups=5), 0)
    assert len(set(drawn)) == 120


def test_fewer_problems_than_a_round() -> None:
    curriculum = make_curriculum(LearningProgress(round_problems=256), DifficultyModel(np.array([5, 6]), 0.5))
    assert set(pool(curriculum, 0)) == {0, 1}


def test_learning_progress_goes_on_from_its_state() -> None:
    first = progressing(LearningProgress())
    second = progressing(LearningProgress(), groups=0)
    assert pool(first, 2) != pool(second, 2)
    second.load(first.save())
    assert first.save() == second.save()


def test_the_first_group_of_all_is_no_progress() -> None:
    curriculum = make_curriculum(LearningProgress(), DifficultyModel(np.array([5, 50]), 0.5))
    curriculum.observe(0, 1.0)
    curriculum.observe(1, 0.25)  # compared with the nearest problem
    assert curriculum._window[:, -1].tolist() == [0.0, 0.75]  # type: ignore[attr-defined]
