import warnings

import numpy as np
import pytest
from learner_script import make_groups

from learner.overlong import overlong_penalties, without_overlong


def test_by_hand() -> None:
    lengths = np.array([0, 80, 81, 90, 100, 101, 500], np.int32)
    assert overlong_penalties(lengths, 100, 20).tolist() == pytest.approx([0, 0, 0.05, 0.5, 1, 1, 1])
    assert overlong_penalties(lengths, 100, 0).tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_agrees_with_trl() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.rewards.other_rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    expected = [-reward for reward in theirs([[7] * length for length in range(130)])]
    assert overlong_penalties(np.arange(130), 100, 20).tolist() == pytest.approx(expected)


def test_rewards_lose_the_penalty() -> None:
    (group,) = without_overlong(make_groups(0)[:1], 10, 4)
    before = make_groups(0)[0]
    assert np.allclose(before.rewards - group.rewards, overlong_penalties(before.lengths, 10, 4))
    assert (before.rewards != group.rewards).any()


def test_without_a_limit_nothing_changes() -> None:
    (group,) = without_overlong(make_groups(0)[:1], 0, 4)
    assert np.array_equal(group.rewards, make_groups(0)[0].rewards)
