"""The policy loss: clipped, with token-level truncated importance sampling. Pure functions of tensors."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from learner.config import LossConfig


@dataclass(frozen=True)
class LossSums:
    """Sums over loss-bearing tokens; additive, so those of micro-batches and ranks can be added up.

    All are float64 scalar tensors without gradient.
    tokens: their number. loss: of the per-token losses. clipped_low, clipped_high: tokens without gradient because
    their ratio left the clip range, below with A < 0 or above with A > 0. truncated: tokens whose importance weight
    was cut to the cap. k3: of the k3 estimates of KL(sampled ‖ now). weight, weight_squared: of the uncut weights
    w = exp(now - sampled), for the effective sample size (Σw)² / (n Σw²). lag0_tokens, lag0_k3: lag 0 alone.
    """

    tokens: Tensor
    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    truncated: Tensor
    k3: Tensor
    weight: Tensor
    weight_squared: Tensor
    lag0_tokens: Tensor
    lag0_k3: Tensor

    def vector(self) -> Tensor:
        """float64 [10], in the order of the fields."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Tensor) -> "LossSums":
        return cls(*vector.unbind())


def policy_loss(
    logprobs: Tensor, sampled: Tensor, advantages: Tensor, mask: Tensor, lags: Tensor, config: LossConfig
) -> tuple[Tensor, LossSums]:
    """Clipped policy-gradient loss with token-level truncated importance sampling (TIS), summed over tokens.

        proximal = stop_gradient(logprobs)  or  sampled        (config.proximal: current | sampled)
        weight   = stop_gradient(min(exp(proximal - sampled), cap))
        ratio    = exp(logprobs - proximal)
        loss_t   = -weight · min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A)

    With `current` the ratio is 1 in value, so nothing is clipped and the weight alone corrects for lag and for the
    mismatch between engine and learner; with `sampled` the weight is 1 and the clip bounds the distance to the
    sampling policy, as in PPO. The caller divides the sum by the global number of loss-bearing tokens.

    Args: logprobs, sampled, advantages: float32 [T]; log-probabilities of the tokens now (with gradient) and when
        they were sampled, both at the sampling temperature. mask: bool [T], True where a token bears loss.
        lags: int64 [T], versions between training and the oldest token of the token's completion: after a change of
            version in flight the engine goes on from the old version's KV cache, so its later tokens are a mixture.
    Returns: (summed loss, a scalar with gradient; sums, without). Exactly 0, gradient too, where A is 0.
    Source: PPO (arXiv:1707.06347); clip-higher: DAPO (arXiv:2503.14476); TIS: Yao et al. 2025, "Your efficient RL
        framework secretly brings you off-policy RL training".
    """
    proximal = logprobs.detach() if config.proximal == "current" else sampled
    importance = (proximal - sampled).exp()
    ratio = (logprobs - proximal).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    per_token = torch.where(mask, -importance.clamp(max=config.importance_cap) * surrogate, 0.0)
    with torch.no_grad():
        flags = {
            "clipped_low": (ratio < low) & (advantages < 0),
            "clipped_high": (ratio > high) & (advantages > 0),
            "truncated": importance > config.importance_cap,
        }
        sums = _sums(per_token, logprobs - sampled, mask, lags, flags)
    return per_token.sum(), sums


def k3_divergence(log_ratio: Tensor) -> Tensor:
    """Estimate r - 1 - log r of KL(p ‖ q) per token drawn from p, where log r = log q - log p. Never negative.

    Args: log_ratio: [T]. Returns: [T], nats.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    return log_ratio.expm1() - log_ratio


def _sums(per_token: Tensor, log_ratio: Tensor, mask: Tensor, lags: Tensor, flags: dict[str, Tensor]) -> LossSums:
    def total(values: Tensor, where: Tensor = mask) -> Tensor:
        return torch.where(where, values.double(), 0.0).sum()

    weight = log_ratio.double().exp()
    k3 = k3_divergence(log_ratio.double())
    fresh = mask & (lags == 0)
    return LossSums(
        tokens=mask.double().sum(),
        loss=total(per_token),
        k3=total(k3),
        weight=total(weight),
        weight_squared=total(weight.square()),
        lag0_tokens=fresh.double().sum(),
        lag0_k3=total(k3, fresh),
        **{name: total(flag) for name, flag in flags.items()},
    )
