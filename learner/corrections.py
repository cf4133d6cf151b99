"""Off-policy correction: what a token's loss is multiplied by, because another policy sampled it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.config import LossConfig

MAX_LOG_RATIO = 20.0
"""Beyond it a ratio is as good as infinite; exp would overflow, and infinity times an advantage of 0 is no number."""


@dataclass(frozen=True)
class SequenceIndex:
    """Which sequence each of K tokens belongs to. owners: int64 [K], in 0..count-1."""

    owners: Tensor
    count: int

    def sums(self, values: Tensor) -> Tensor:
        """[K]: for each token the sum of values [K] over its sequence, with gradient."""
        return torch.zeros(self.count, dtype=values.dtype, device=values.device).index_add(0, self.owners, values)[
            self.owners
        ]

    def means(self, values: Tensor) -> Tensor:
        return self.sums(values) / self.sums(torch.ones_like(values))


def bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def correction_weights(log_ratio: Tensor, sequences: SequenceIndex, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Weights of tokens for r = proximal over sampled probability; low, cap = importance_low, importance_cap.

    `none`:           1
    `token_tis`:      clamp(r_t, low, cap)
    `sequence_tis`:   clamp(Π r, low, cap), the product over the sequence's loss-bearing tokens
    `token_mask`:     r_t where low <= r_t <= cap, else 0
    `sequence_mask`:  Π r where low <= Π r <= cap, else 0
    `geometric_mask`: 1 where low <= (Π r)^(1/length) <= cap, else 0

    Args: log_ratio: [K], log r, without gradient.
    Returns: (weights [K]; bool [K], True where the weight was cut or the token rejected).
    Source: TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; masks:
        IcePop (Ling team 2025) for tokens, MIS (Liu, Li et al. 2025, "When speed kills stability") for sequences, and
        its geometric mean. TRL 1.16: `vllm_importance_sampling_mode` `token_truncate`, `sequence_truncate`,
        `token_mask`, `sequence_mask`; it has no geometric mean. TRL differs in that by default nothing bounds below.
    """
    low, cap = config.importance_low, config.importance_cap
    match config.correction:
        case "none":
            ratio = torch.ones_like(log_ratio)
        case "token_tis" | "token_mask":
            ratio = bounded_exp(log_ratio)
        case "sequence_tis" | "sequence_mask":
            ratio = bounded_exp(sequences.sums(log_ratio))
        case "geometric_mask":
            ratio = bounded_exp(sequences.means(log_ratio))
    if config.correction == "none":
        return ratio, torch.zeros_like(ratio, dtype=torch.bool)
    outside = (ratio < low) | (ratio > cap)
    if config.correction in ("token_tis", "sequence_tis"):
        return ratio.clamp(low, cap), outside
    kept = torch.ones_like(ratio) if config.correction == "geometric_mask" else ratio
    return torch.where(outside, 0.0, kept), outside
