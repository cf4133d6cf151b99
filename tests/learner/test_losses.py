import math

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.config import LossConfig
from learner.losses import LossSums, k3_divergence, policy_loss

CURRENT = LossConfig(clip_low=0.2, clip_high=0.28, importance_cap=2.0, proximal="current")
SAMPLED = LossConfig(clip_low=0.2, clip_high=0.28, importance_cap=2.0, proximal="sampled")


def loss_of(
    ratios: list[float], advantages: list[float], config: LossConfig, mask: list[bool] | None = None
) -> tuple[Tensor, LossSums, Tensor]:
    """Loss, sums and gradient of tokens sampled with probability 0.5 whose probability has changed by `ratios`."""
    sampled = torch.full((len(ratios),), math.log(0.5))
    logprobs = (sampled + torch.tensor(ratios).log()).requires_grad_()
    kept = torch.tensor(mask if mask is not None else [True] * len(ratios))
    lags = torch.arange(len(ratios))
    loss, sums = policy_loss(logprobs, sampled, torch.tensor(advantages), kept, lags, config)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), sums, logprobs.grad


def test_current_by_hand() -> None:
    # weight = min(exp(now - sampled), 2): 1.5, 0.5, and 3 cut to 2; ratio = 1 in value.
    # loss = -(1.5 * 1 + 0.5 * -2 + 2 * 1) = -2.5; d loss / d logprob = -weight * A.
    loss, sums, grad = loss_of([1.5, 0.5, 3.0], [1.0, -2.0, 1.0], CURRENT)
    assert loss.item() == pytest.approx(-2.5)
    assert grad.tolist() == pytest.approx([-1.5, 1.0, -2.0])
    assert sums.truncated == 1
    assert sums.clipped_low == sums.clipped_high == 0


def test_sampled_by_hand() -> None:
    # ratios 1.5 (A=1: clipped to 1.28), 0.5 (A=-2: clipped to 0.8, min(-1, -1.6) = -1.6), 0.5 (A=1: min(0.5, 0.8)),
    # 1.5 (A=-1: min(-1.5, -1.28) = -1.5). loss = -(1.28 - 1.6 + 0.5 - 1.5) = 1.32.
    # No gradient where the clip holds; elsewhere d loss / d logprob = -ratio * A.
    loss, sums, grad = loss_of([1.5, 0.5, 0.5, 1.5], [1.0, -2.0, 1.0, -1.0], SAMPLED)
    assert loss.item() == pytest.approx(1.32)
    assert grad.tolist() == pytest.approx([0.0, 0.0, -0.5, 1.5])
    assert (sums.clipped_high, sums.clipped_low, sums.truncated) == (1, 1, 0)


def test_sums_by_hand() -> None:
    # r = 2 and 0.5. k3 = r - 1 - ln r: 1 - 0.693147 = 0.306853 and -0.5 + 0.693147 = 0.193147. Lag 0: the first only.
    # Σw = 2.5, Σw² = 4.25.
    _, sums, _ = loss_of([2.0, 0.5], [1.0, 1.0], CURRENT)
    assert sums.tokens == 2
    assert sums.k3.item() == pytest.approx(0.5, abs=1e-6)
    assert sums.weight.item() == pytest.approx(2.5)
    assert sums.weight_squared.item() == pytest.approx(4.25)
    assert sums.lag0_tokens == 1
    assert sums.lag0_k3.item() == pytest.approx(0.306853, abs=1e-6)


def test_masked_tokens_count_for_nothing() -> None:
    with_masked = loss_of([1.5, 9.0, 0.5], [1.0, 5.0, -2.0], CURRENT, mask=[True, False, True])
    without = loss_of([1.5, 0.5], [1.0, -2.0], CURRENT)
    assert with_masked[0] == without[0]
    assert with_masked[2].tolist() == pytest.approx([-1.5, 0.0, 1.0])
    assert with_masked[1].tokens == 2
    assert with_masked[1].k3 == without[1].k3


@pytest.mark.parametrize("config", [CURRENT, SAMPLED])
def test_zero_advantage_gives_exactly_no_gradient(config: LossConfig) -> None:
    """Packing relies on it: such tokens get no backward pass."""
    loss, _, grad = loss_of([0.1, 1.0, 7.0], [0.0, 0.0, 0.0], config)
    assert loss == 0
    assert not grad.any()


def naive_loss(logprobs: list[float], sampled: list[float], advantages: list[float], config: LossConfig) -> float:
    """The formula once more, token by token, in Python floats."""
    total = 0.0
    for now, then, advantage in zip(logprobs, sampled, advantages, strict=True):
        proximal = now if config.proximal == "current" else then
        weight = min(math.exp(proximal - then), config.importance_cap)
        ratio = math.exp(now - proximal)
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        total -= weight * min(ratio * advantage, clipped * advantage)
    return total


@pytest.mark.parametrize("config", [CURRENT, SAMPLED])
def test_agrees_with_a_naive_implementation(config: LossConfig) -> None:
    rng = np.random.default_rng(0)
    logprobs, sampled = -rng.uniform(0.05, 4.0, (2, 500))
    advantages = rng.normal(size=500)
    everything = torch.ones(500, dtype=torch.bool)
    lags = torch.zeros(500, dtype=torch.int64)
    now, then, advantage = (torch.from_numpy(values) for values in (logprobs, sampled, advantages))
    loss, _ = policy_loss(now, then, advantage, everything, lags, config)
    assert loss.item() == pytest.approx(naive_loss(logprobs.tolist(), sampled.tolist(), advantages.tolist(), config))


def test_sums_add_up_over_parts() -> None:
    whole = loss_of([1.5, 0.5, 3.0, 0.9], [1.0, -2.0, 1.0, 0.3], SAMPLED)[1].vector()
    mask = [True, True, False, False]
    parts = [
        loss_of([1.5, 0.5, 3.0, 0.9], [1.0, -2.0, 1.0, 0.3], SAMPLED, part)[1].vector()
        for part in (mask, [not kept for kept in mask])
    ]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-12)
    assert LossSums.from_vector(whole).tokens == 4


def test_k3_is_exact_in_expectation() -> None:
    """Its mean under p is KL(p ‖ q), here of two distributions over three outcomes."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    exact = (p * (p / q).log()).sum()
    assert torch.isclose((p * k3_divergence((q / p).log())).sum(), exact)
