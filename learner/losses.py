"""The policy loss: a surrogate, its off-policy correction, divergence and entropy. Pure functions of tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.config import LossConfig
from learner.corrections import SequenceIndex, bounded_exp, correction_weights
from learner.divergence import divergence
from learner.loss_sums import LossSums


@dataclass(frozen=True)
class LossTokens:
    """What is known of K loss-bearing tokens beside their log-probabilities now; of whole sequences.

    sampled, advantages: float32 [K]; log-probabilities when they were sampled, at the sampling temperature. weights:
    float32 [K], as `learner.aggregation`. owners: int64 [K], which of num_sequences sequences. lags: int64 [K], steps
    between training and the oldest token of the completion: after a change of version in flight the engine goes on from
    the old version's KV cache, so later tokens are a mixture. recomputed: float32 [K], the learner's
    log-probabilities when the batch began. reference: float32 [K], the initial model's. None where not asked for.
    """

    sampled: Tensor
    advantages: Tensor
    weights: Tensor
    owners: Tensor
    lags: Tensor
    num_sequences: int
    recomputed: Tensor | None = None
    reference: Tensor | None = None

    def to(self, device: torch.device) -> "LossTokens":
        return replace(self, **{name: v.to(device) for name, v in self.__dict__.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Surrogate:
    """Loss of each token before correction, [K], with gradient; and where the clip took the gradient or changed the
    weight, bool [K]: ratio below the range, ratio above it."""

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def policy_loss(logprobs: Tensor, entropy: Tensor, tokens: LossTokens, config: LossConfig) -> tuple[Tensor, LossSums]:
    """The loss of K tokens: their share of the batch's, so that shares of micro-batches and ranks add up to it.

        proximal = stop_gradient(logprobs), tokens.recomputed or tokens.sampled       (config.proximal)
        correction = stop_gradient(w(exp(proximal - sampled)))                        (learner.corrections)
        loss = Σ weight · (correction · surrogate + kl_coef · divergence - entropy_coef · entropy)

    Args: logprobs: float32 [K], of the tokens now, at the sampling temperature. entropy: float32 [K].
    Returns: (loss, a scalar with gradient; sums, without). Exactly 0, gradient too, where all A are 0 and the
        configuration is not `regularised`.
    Source: decoupled PPO: Hilton et al. (arXiv:2110.00641), AReaL (arXiv:2505.24298). TRL 1.16: `_compute_loss`, whose
        `old_per_token_logps` are what `recomputed` is here, and whose entropy bonus is a mean over tokens whatever
        `loss_type` is; here `aggregation` is that of all terms.
    """
    proximal = _proximal(logprobs, tokens, config)
    sequences = SequenceIndex(tokens.owners, tokens.num_sequences)
    correction, cut = correction_weights(proximal - tokens.sampled, sequences, config)
    surrogate = SURROGATES[config.kind](logprobs, proximal, tokens.advantages, sequences, config)
    policy = correction * surrogate.loss
    loss = policy
    reference_kl = torch.zeros_like(policy)
    if tokens.reference is not None:
        reference_kl = divergence(tokens.reference - logprobs, config.kl_estimator)
        if config.kl_in == "loss":
            loss = loss + config.kl_coef * reference_kl
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * entropy
    sums = LossSums.of_tokens(
        tokens.lags,
        log_ratio=logprobs - tokens.sampled,
        loss=tokens.weights * policy,
        clipped_low=surrogate.clipped_low,
        clipped_high=surrogate.clipped_high,
        cut=cut,
        entropy=entropy,
        reference_kl=reference_kl,
    )
    return (tokens.weights * loss).sum(), sums


def ppo(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, sequences: SequenceIndex, config: LossConfig
) -> Surrogate:
    """-min(r · A, clip(r, 1 - low, 1 + high) · A), r = exp(logprobs - proximal); with a dual clip c, where A < 0, no
    more than -c · A.

    Source: PPO (arXiv:1707.06347); clip-higher: DAPO (arXiv:2503.14476); dual clip: Ye et al. (arXiv:1912.09729).
    TRL: `epsilon`, `epsilon_high`, and `delta`, which is the same as the dual clip for any c above 1 + high.
    """
    return _clipped(bounded_exp(logprobs - proximal), advantages, config)


def gspo(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, sequences: SequenceIndex, config: LossConfig
) -> Surrogate:
    """As `ppo` with one ratio a sequence, the geometric mean over its loss-bearing tokens.

    Source: GSPO (arXiv:2507.18071), with `aggregation=sequence`. TRL: `importance_sampling_level=sequence`.
    """
    return _clipped(bounded_exp(sequences.means(logprobs - proximal)), advantages, config)


def cispo(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, sequences: SequenceIndex, config: LossConfig
) -> Surrogate:
    """-stop_gradient(clip(r, 1 - low, 1 + high)) · A · logprobs: no token loses its gradient.

    Source: CISPO, MiniMax-M1 (arXiv:2506.13585), which leaves out the lower bound: clip_low=1. TRL: `cispo`, without it
    too, whose `epsilon_high` is the bound itself, 1 + clip_high.
    """
    ratio = bounded_exp((logprobs - proximal).detach())
    low, high = 1 - config.clip_low, 1 + config.clip_high
    return Surrogate(-ratio.clamp(low, high) * advantages * logprobs, ratio < low, ratio > high)


def aipo(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, sequences: SequenceIndex, config: LossConfig
) -> Surrogate:
    """-stop_gradient(min(r, importance_cap)) · A · logprobs.

    Source: AIPO, LlamaRL (arXiv:2505.24034), where r is against the sampling policy: proximal=sampled. TRL: `cispo`
    with `epsilon_high` as the cap.
    """
    ratio = bounded_exp((logprobs - proximal).detach())
    over = ratio > config.importance_cap
    return Surrogate(-ratio.clamp(max=config.importance_cap) * advantages * logprobs, torch.zeros_like(over), over)


def reinforce(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, sequences: SequenceIndex, config: LossConfig
) -> Surrogate:
    """-A · logprobs. Source: Williams 1992."""
    nowhere = torch.zeros_like(logprobs, dtype=torch.bool)
    return Surrogate(-advantages * logprobs, nowhere, nowhere)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, SequenceIndex, LossConfig], Surrogate]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "aipo": aipo,
    "reinforce": reinforce,
}


def _proximal(logprobs: Tensor, tokens: LossTokens, config: LossConfig) -> Tensor:
    if config.proximal == "sampled":
        return tokens.sampled
    if config.proximal == "recomputed" and tokens.recomputed is not None:
        return tokens.recomputed
    return logprobs.detach()


def _clipped(ratio: Tensor, advantages: Tensor, config: LossConfig) -> Surrogate:
    low, high = 1 - config.clip_low, 1 + config.clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    if config.dual_clip > 0:
        over = (ratio > config.dual_clip) & (advantages < 0)
        objective = torch.where(over, config.dual_clip * advantages, objective)
        above = above | over
    return Surrogate(-objective, below, above)
