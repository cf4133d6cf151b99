from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_script import make_groups

from learner.advantages import (
    ESTIMATORS,
    batch_advantages,
    decoupled_advantages,
    estimate_advantages,
    group_advantages,
    leave_one_out_advantages,
    mixed_advantages,
)
from learner.checks import ESTIMATORS as NAMES

REWARDS = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0]])


def test_grpo_by_hand() -> None:
    # Group 1: mean 0.5, squared deviations 4 * 0.25 = 1, sample variance 1/3, A = ±0.5/0.57735 = ±0.866025.
    # Group 2: mean 1, deviations (-1, 0, 0, 1), variance 2/3, std 0.816497: A = ±1.224745 and 0.
    expected = torch.tensor([[-0.866025, 0.866025, 0.866025, -0.866025], [-1.224745, 0.0, 0.0, 1.224745]])
    assert torch.allclose(group_advantages(REWARDS), expected, atol=1e-5)


def test_dr_grpo_only_centres() -> None:
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-1.0, 0.0, 0.0, 1.0]])
    assert torch.equal(group_advantages(REWARDS, scale=False), expected)


def test_leave_one_out_by_hand() -> None:
    # Group 2: the others' means are 4/3, 1, 1, 2/3.
    expected = torch.tensor([[-2 / 3, 2 / 3, 2 / 3, -2 / 3], [-4 / 3, 0, 0, 4 / 3]])
    assert torch.allclose(leave_one_out_advantages(REWARDS), expected)


def test_batch_by_hand() -> None:
    # All eight: mean 0.75, squares 8 - 2 * 0.75 * 6 + 8 * 0.5625 = 8 - 4.5 = 3.5, variance 3.5 / 7 = 0.5.
    expected = (REWARDS - 0.75) / 0.707107
    assert torch.allclose(batch_advantages(REWARDS), expected, atol=1e-5)


def test_batch_with_groups_centred_by_hand() -> None:
    # Centred: mean 0, squares 1 + 2 = 3, variance 3 / 7, std 0.654654.
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-1.0, 0.0, 0.0, 1.0]]) / 0.654654
    assert torch.allclose(batch_advantages(REWARDS, centre_groups=True), expected, atol=1e-5)


def test_mixed_by_hand() -> None:
    expected = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-1.0, 0.0, 0.0, 1.0]]) / 0.707107
    assert torch.allclose(mixed_advantages(REWARDS), expected, atol=1e-5)


def test_decoupled_by_hand() -> None:
    # Two groups, agreeing in one part: sums ±1.414214 and ±0.707107, squares 5 in all, variance 5 / 3, std 1.290994.
    parts = torch.tensor([[[0.0, 0.0], [1.0, 9.0]], [[0.0, 4.0], [1.0, 4.0]]])
    expected = torch.tensor([[-1.414214, 1.414214], [-0.707107, 0.707107]]) / 1.290994
    assert torch.allclose(decoupled_advantages(parts), expected, atol=1e-5)


def test_eps_bounds_tiny_deviations() -> None:
    # Deviation of (0, 2e-6) is 1.41421e-6; A = ±1e-6 / (1.41421e-6 + 1e-6) = ±0.414214.
    advantages = group_advantages(torch.tensor([[0.0, 2e-6]]), eps=1e-6)
    assert torch.allclose(advantages, torch.tensor([[-0.414214, 0.414214]]), atol=1e-4)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 33), st.sampled_from(sorted(ESTIMATORS.keys() - {"none"})))
def test_equal_rewards_give_exact_zeros(reward: float, size: int, estimator: str) -> None:
    assert not ESTIMATORS[estimator](torch.full((2, size), reward)).any()


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS.keys() - {"none"}))
@pytest.mark.parametrize("shape", [(3, 1), (4,), (2, 2, 2)])
def test_wrong_shapes_are_refused(estimator: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards must be \[N, G\] with G >= 2, got shape"):
        ESTIMATORS[estimator](torch.zeros(shape))


def test_every_estimator_that_can_be_named_is_there() -> None:
    assert {*ESTIMATORS, "gdpo"} == {*NAMES}
    groups = make_groups(0)
    for name in NAMES:
        advantages = estimate_advantages(groups, name)
        assert [each.shape for each in advantages] == [(4,)] * len(groups)
        assert advantages[0].dtype == np.float32


def test_a_reward_without_parts_is_its_own_part() -> None:
    groups = make_groups(0)
    parts = [replace(group, reward_parts=group.rewards[:, None]) for group in groups]
    for ours, theirs in zip(estimate_advantages(groups, "gdpo"), estimate_advantages(parts, "gdpo"), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_group_of_one_is_refused() -> None:
    group = make_groups(0)[0]
    single = replace(group, rewards=group.rewards[:1])
    with pytest.raises(ValueError, match="G >= 2"):
        estimate_advantages([single], "grpo")


def test_groups_of_different_sizes_are_refused() -> None:
    first, second, *_ = make_groups(0)
    with pytest.raises(
        ValueError, match=r"groups of a batch differ in completions or parts of rewards: \(3,\) and \(4,\)"
    ):
        estimate_advantages([first, replace(second, rewards=second.rewards[:3])], "grpo")
