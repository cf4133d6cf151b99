"""How the losses of tokens become the loss of a batch: what each token's loss is multiplied by."""

from collections.abc import Sequence

from learner.config import LossConfig


def token_weights(lengths: Sequence[int], config: LossConfig) -> list[float]:
    """Weight of each loss-bearing token of every completion; the batch's loss is the weighted sum over its tokens.

    `token`:    1 / Σ lengths               DAPO (arXiv:2503.14476); TRL: `bnpo` over one pass, `dapo` over the batch
    `sequence`: 1 / (B · length)            DeepSeekMath (arXiv:2402.03300); TRL: `grpo`
    `fixed`:    1 / (B · fixed_tokens)      Dr. GRPO (arXiv:2503.20783); TRL: `dr_grpo`, by `max_completion_length`

    Weights depend on the batch as a whole, so that the gradient does not on how it is split. TRL's `grpo`, `bnpo` and
    `dr_grpo` average over passes instead, whatever these hold.
    Args: lengths: loss-bearing tokens of each of the B completions; one without any still counts in B.
    """
    match config.aggregation:
        case "token":
            return [1 / max(1, sum(lengths))] * len(lengths)
        case "sequence":
            return [1 / (len(lengths) * max(1, length)) for length in lengths]
        case "fixed":
            return [1 / (len(lengths) * config.fixed_tokens)] * len(lengths)
