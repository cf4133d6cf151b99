import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from learner.config import LossConfig
from learner.loss_sums import FIELDS, LAG_BUCKETS, LossSums
from learner.losses import LossTokens, policy_loss

CURRENT = LossConfig(clip_low=0.2, clip_high=0.28, importance_cap=2.0, proximal="current")
SAMPLED = LossConfig(clip_low=0.2, clip_high=0.28, importance_cap=2.0, proximal="sampled")
KINDS = ("ppo", "gspo", "cispo", "aipo", "reinforce")


def make_tokens(sampled: Tensor, advantages: list[float], owners: list[int] | None = None, **more: Any) -> LossTokens:
    owners = owners or [0] * len(sampled)
    settings: dict[str, Any] = {
        "sampled": sampled,
        "advantages": torch.tensor(advantages, dtype=sampled.dtype),
        "weights": torch.ones_like(sampled),
        "owners": torch.tensor(owners),
        "lags": torch.arange(len(sampled)),
        "num_sequences": max(owners, default=-1) + 1,
    }
    return LossTokens(**(settings | more))


def loss_of(
    ratios: list[float], advantages: list[float], config: LossConfig, owners: list[int] | None = None, **more: Any
) -> tuple[float, LossSums, list[float]]:
    """Loss, sums and gradient of tokens sampled with probability 0.5 whose probability has changed by `ratios`."""
    sampled = torch.full((len(ratios),), math.log(0.5))
    logprobs = (sampled + torch.tensor(ratios).log()).requires_grad_()
    tokens = make_tokens(sampled, advantages, owners, **more)
    loss, sums = policy_loss(logprobs, torch.zeros_like(sampled), tokens, config)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), sums, logprobs.grad.tolist()


def total(sums: LossSums, field: str) -> float:
    return sums.values.sum(dim=0)[FIELDS.index(field)].item()


def test_current_by_hand() -> None:
    # weight = min(exp(now - sampled), 2): 1.5, 0.5, and 3 cut to 2; ratio = 1 in value.
    # loss = -(1.5 * 1 + 0.5 * -2 + 2 * 1) = -2.5; d loss / d logprob = -weight * A.
    loss, sums, grad = loss_of([1.5, 0.5, 3.0], [1.0, -2.0, 1.0], CURRENT)
    assert loss == pytest.approx(-2.5)
    assert grad == pytest.approx([-1.5, 1.0, -2.0])
    assert (total(sums, "cut"), total(sums, "clipped_low"), total(sums, "clipped_high")) == (1, 0, 0)


def test_sampled_by_hand() -> None:
    # ratios 1.5 (A=1: clipped to 1.28), 0.5 (A=-2: clipped to 0.8, min(-1, -1.6) = -1.6), 0.5 (A=1: min(0.5, 0.8)),
    # 1.5 (A=-1: min(-1.5, -1.28) = -1.5). loss = -(1.28 - 1.6 + 0.5 - 1.5) = 1.32.
    # No gradient where the clip holds; elsewhere d loss / d logprob = -ratio * A.
    loss, sums, grad = loss_of([1.5, 0.5, 0.5, 1.5], [1.0, -2.0, 1.0, -1.0], SAMPLED)
    assert loss == pytest.approx(1.32)
    assert grad == pytest.approx([0.0, 0.0, -0.5, 1.5])
    assert (total(sums, "cut"), total(sums, "clipped_low"), total(sums, "clipped_high")) == (0, 1, 1)


def test_dual_clip_by_hand() -> None:
    # A = -1: ratio 5 is bounded by 3: loss 3, no gradient; ratio 2 is not: loss 2, gradient 2. A = 1: clip_high holds.
    config = msgspec.structs.replace(SAMPLED, dual_clip=3.0)
    loss, sums, grad = loss_of([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], config)
    assert loss == pytest.approx(3 + 2 - 1.28)
    assert grad == pytest.approx([0.0, 2.0, 0.0])
    assert total(sums, "clipped_high") == 2


def test_gspo_by_hand() -> None:
    # Sequence 0: ratios 4 and 1, geometric mean 2, A = -1: unclipped, 2 for each token: loss 4, gradient 4 / 2 each.
    # Sequence 1: one token of ratio 1.5, A = 1: clipped at 1.28.
    config = msgspec.structs.replace(SAMPLED, kind="gspo")
    loss, sums, grad = loss_of([4.0, 1.0, 1.5], [-1.0, -1.0, 1.0], config, owners=[0, 0, 1])
    assert loss == pytest.approx(4 - 1.28)
    assert grad == pytest.approx([2.0, 2.0, 0.0])
    assert total(sums, "clipped_high") == 1


def test_cispo_by_hand() -> None:
    # Every token keeps its gradient -clip(r) * A, here of r = 1.5 -> 1.28, 0.5 -> 0.8, and 1.1.
    config = msgspec.structs.replace(SAMPLED, kind="cispo")
    loss, sums, grad = loss_of([1.5, 0.5, 1.1], [1.0, -2.0, 1.0], config)
    assert grad == pytest.approx([-1.28, 1.6, -1.1])
    logprobs = [math.log(0.75), math.log(0.25), math.log(0.55)]
    assert loss == pytest.approx(-1.28 * logprobs[0] + 1.6 * logprobs[1] - 1.1 * logprobs[2])
    assert (total(sums, "clipped_low"), total(sums, "clipped_high")) == (1, 1)


def test_aipo_by_hand() -> None:
    config = msgspec.structs.replace(SAMPLED, kind="aipo")
    _, sums, grad = loss_of([3.0, 0.1], [1.0, -1.0], config)
    assert grad == pytest.approx([-2.0, 0.1])
    assert (total(sums, "clipped_low"), total(sums, "clipped_high")) == (0, 1)


def test_reinforce_by_hand() -> None:
    config = msgspec.structs.replace(CURRENT, kind="reinforce", correction="none")
    loss, _, grad = loss_of([2.0, 0.5], [1.0, -3.0], config)
    assert grad == pytest.approx([-1.0, 3.0])
    assert loss == pytest.approx(-math.log(1.0) + 3 * math.log(0.25))


def test_decoupled_by_hand() -> None:
    # sampled 0.5, recomputed 0.6: correction 1.2. Now 0.9: ratio 1.5, clipped to 1.28 with A = 1; now 0.3, A = 1: 0.5.
    config = msgspec.structs.replace(CURRENT, proximal="recomputed")
    recomputed = torch.full((2,), math.log(0.6))
    loss, _, grad = loss_of([1.8, 0.6], [1.0, 1.0], config, recomputed=recomputed)
    assert loss == pytest.approx(-1.2 * (1.28 + 0.5))
    assert grad == pytest.approx([0.0, -0.6])


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    # log r = log(reference / now) = log 0.5: k1 = ln 2, k2 = ln² 2 / 2, k3 = 0.5 - 1 + ln 2.
    # d k1 / d logprob = 1, d k2 = -log r = ln 2, d k3 = 1 - r = 0.5.
    [("k1", 0.693147, 1.0), ("k2", 0.240227, 0.693147), ("k3", 0.193147, 0.5)],
)
def test_divergence_from_the_reference_by_hand(estimator: Any, value: float, gradient: float) -> None:
    config = LossConfig(kl_coef=0.1, kl_estimator=estimator)
    reference = torch.full((1,), math.log(0.25))
    loss, sums, grad = loss_of([1.0], [0.0], config, reference=reference)
    assert loss == pytest.approx(0.1 * value, abs=1e-6)
    assert grad == pytest.approx([0.1 * gradient], abs=1e-6)
    assert total(sums, "reference_kl") == pytest.approx(value, abs=1e-6)
    assert total(sums, "loss") == 0


def test_divergence_in_the_reward_is_not_in_the_loss() -> None:
    config = LossConfig(kl_coef=0.1, kl_in="reward")
    loss, sums, grad = loss_of([1.0], [0.0], config, reference=torch.full((1,), math.log(0.25)))
    assert (loss, grad) == (0, [0])
    assert total(sums, "reference_kl") > 0


def test_entropy_bonus_by_hand() -> None:
    entropy = torch.tensor([0.5, 2.0], requires_grad=True)
    logprobs = torch.zeros(2)
    tokens = make_tokens(torch.zeros(2), [0.0, 0.0], weights=torch.tensor([0.25, 0.75]))
    loss, _ = policy_loss(logprobs, entropy, tokens, LossConfig(entropy_coef=0.1))
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * (0.25 * 0.5 + 0.75 * 2.0))
    assert entropy.grad is not None and entropy.grad.tolist() == pytest.approx([-0.025, -0.075])


def test_tokens_weigh_as_told() -> None:
    loss, sums, grad = loss_of([1.5, 0.5], [1.0, -2.0], CURRENT, weights=torch.tensor([0.5, 0.25]))
    assert loss == pytest.approx(-0.5 * 1.5 + 0.25 * 1.0)
    assert grad == pytest.approx([-0.75, 0.25])
    assert total(sums, "loss") == pytest.approx(loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proximal", ["current", "sampled"])
def test_zero_advantage_gives_exactly_no_gradient(kind: Any, proximal: Any) -> None:
    """Packing relies on it: such tokens get no backward pass. Not even ratios that overflow may make it NaN."""
    config = LossConfig(kind=kind, proximal=proximal)
    sampled = torch.tensor([-200.0, -1.0, -0.1])
    logprobs = torch.tensor([-0.1, -1.0, -200.0]).requires_grad_()
    loss, _ = policy_loss(logprobs, torch.zeros(3), make_tokens(sampled, [0.0] * 3), config)
    loss.backward()
    assert loss == 0
    assert logprobs.grad is not None and not logprobs.grad.any()


def naive_loss(logprobs: list[float], sampled: list[float], advantages: list[float], config: LossConfig) -> float:
    """The formula of `ppo` once more, token by token, in Python floats."""
    result = 0.0
    for now, then, advantage in zip(logprobs, sampled, advantages, strict=True):
        proximal = now if config.proximal == "current" else then
        weight = min(math.exp(proximal - then), config.importance_cap)
        ratio = math.exp(now - proximal)
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        result -= weight * min(ratio * advantage, clipped * advantage)
    return result


@pytest.mark.parametrize("config", [CURRENT, SAMPLED])
def test_agrees_with_a_naive_implementation(config: LossConfig) -> None:
    rng = np.random.default_rng(0)
    logprobs, sampled = -rng.uniform(0.05, 4.0, (2, 500))
    advantages = rng.normal(size=500)
    tokens = make_tokens(torch.from_numpy(sampled), advantages.tolist())
    loss, _ = policy_loss(torch.from_numpy(logprobs), torch.zeros(500), tokens, config)
    assert loss.item() == pytest.approx(naive_loss(logprobs.tolist(), sampled.tolist(), advantages.tolist(), config))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correction", ["token_tis", "sequence_tis", "token_mask", "sequence_mask", "geometric_mask"])
def test_shares_of_sequences_add_up(kind: Any, correction: Any) -> None:
    """Sequences apart, in another order, give the loss, the gradient and the sums of all together."""
    config = LossConfig(
        kind=kind, proximal="recomputed", correction=correction, importance_low=0.9, importance_cap=1.05
    )
    rng = np.random.default_rng(1)
    owners = np.repeat([0, 1, 2, 3], [5, 1, 8, 3])
    values = {name: torch.from_numpy(-rng.uniform(0.5, 1.2, 17)) for name in ("now", "sampled", "recomputed")}
    advantages = rng.normal(size=4)[owners]

    def part(chosen: list[int]) -> tuple[float, LossSums, dict[int, list[float]]]:
        places = np.concatenate([np.flatnonzero(owners == owner) for owner in chosen])
        local = [chosen.index(owner) for owner in owners[places]]
        logprobs = values["now"][places].clone().requires_grad_()
        tokens = make_tokens(
            values["sampled"][places], advantages[places].tolist(), local, recomputed=values["recomputed"][places]
        )
        loss, sums = policy_loss(logprobs, torch.zeros(len(places)), tokens, config)
        loss.backward()
        assert logprobs.grad is not None
        grad = logprobs.grad.numpy()
        return loss.item(), sums, {owner: grad[owners[places] == owner].tolist() for owner in chosen}

    whole, first, second = part([0, 1, 2, 3]), part([3, 0]), part([2, 1])
    assert first[0] + second[0] == pytest.approx(whole[0])
    assert total(first[1] + second[1], "cut") == total(whole[1], "cut") > 0
    gradients = first[2] | second[2]
    for owner, gradient in whole[2].items():
        assert gradient == pytest.approx(gradients[owner])


def test_lags_fall_into_their_buckets() -> None:
    assert list(LAG_BUCKETS) == ["0", "1", "2", "3to4", "5to8", "9plus"]
    lags = [0, 1, 2, 3, 4, 5, 8, 9, 40]
    _, sums, _ = loss_of([2.0] * 9, [1.0] * 9, SAMPLED, lags=torch.tensor(lags))
    assert sums.values[:, FIELDS.index("tokens")].tolist() == [1, 1, 1, 2, 2, 2]


def test_metrics_by_hand() -> None:
    # r = 2 (lag 0) and 0.5 (lag 3). k3 = r - 1 - ln r: 0.306853 and 0.193147. w = 2, 0.5: (2.5)² / (2 * 4.25).
    # r = 2 with A = 1 is clipped; 0.5 with A = 1 is not.
    _, sums, _ = loss_of([2.0, 0.5], [1.0, 1.0], SAMPLED, lags=torch.tensor([0, 3]))
    metrics = sums.metrics()
    assert metrics["mismatch/kl"] == pytest.approx(0.25, abs=1e-6)
    assert metrics["mismatch/kl_lag0"] == pytest.approx(0.306853, abs=1e-6)
    assert metrics["mismatch/kl_lag3to4"] == pytest.approx(0.193147, abs=1e-6)
    assert metrics["mismatch/ess"] == pytest.approx(6.25 / 8.5)
    assert metrics["mismatch/ess_lag0"] == 1
    assert (metrics["loss/clip_fraction"], metrics["loss/clip_high_fraction"]) == (0.5, 0.5)
    assert (metrics["loss/clip_fraction_lag0"], metrics["loss/clip_fraction_lag3to4"]) == (1, 0)
    assert not any(name.endswith("_lag1") for name in metrics)


def test_metrics_of_no_tokens() -> None:
    metrics = LossSums.zeros(torch.device("cpu")).metrics()
    assert metrics["mismatch/ess"] == 1
    assert metrics["loss/policy"] == metrics["mismatch/kl"] == 0
