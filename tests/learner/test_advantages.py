import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages


def test_hand_computed() -> None:
    # Group 1: mean 0.5, squared deviations 4 * 0.25 = 1, sample variance 1/3, A = ±0.5/0.57735 = ±0.866025.
    # Group 2: mean 1, deviations (-1, 0, 0, 1), variance 2/3, std 0.816497: A = ±1.224745 and 0.
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0]])
    expected = torch.tensor([[-0.866025, 0.866025, 0.866025, -0.866025], [-1.224745, 0.0, 0.0, 1.224745]])
    assert torch.allclose(group_advantages(rewards), expected, atol=1e-5)


def test_without_scale_only_centres() -> None:
    expected = torch.tensor([[-1.0, 0.0, 0.0, 1.0]])
    assert torch.equal(group_advantages(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), scale=False), expected)


def test_eps_bounds_tiny_deviations() -> None:
    # Deviation of (0, 2e-6) is 1.41421e-6; A = ±1e-6 / (1.41421e-6 + 1e-6) = ±0.414214.
    advantages = group_advantages(torch.tensor([[0.0, 2e-6]]), eps=1e-6)
    assert torch.allclose(advantages, torch.tensor([[-0.414214, 0.414214]]), atol=1e-4)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 33), st.booleans())
def test_equal_rewards_give_exact_zeros(reward: float, size: int, scale: bool) -> None:
    assert not group_advantages(torch.full((2, size), reward), scale).any()


@pytest.mark.parametrize("shape", [(3, 1), (0, 1), (4,), (2, 2, 2)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rewards must be \[N, G\] with G >= 2, got shape"):
        group_advantages(torch.zeros(shape))
