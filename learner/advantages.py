"""Advantages of a group's completions from their rewards."""

from torch import Tensor


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Centre (and scale) rewards within each prompt group.

    A = (r - mean) / (std + eps), with the sample deviation (divisor G - 1); without `scale`, A = r - mean.

    Args: rewards: [N, G], unitless. scale: divide by the group's deviation; False is the variant without the
        difficulty bias (Dr. GRPO). eps: added to the deviation.
    Returns: float32 [N, G]; exact zeros where a group's rewards are equal.
    Raises: ValueError if rewards is not [N, G] or G < 2.
    Source: DeepSeekMath (arXiv:2402.03300), outcome supervision; Dr. GRPO (arXiv:2503.20783).
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, G] with G >= 2, got shape {tuple(rewards.shape)}")
    # float64: the float32 mean of equal rewards need not equal them, and a tiny residue over eps is not zero.
    rewards64 = rewards.double()
    advantages = rewards64 - rewards64.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (rewards64.std(dim=1, keepdim=True) + eps)
    return advantages.float()
