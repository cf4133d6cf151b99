"""Advantages of completions from their rewards: pure functions of tensors, and the choice among them.

Statistics are taken in float64: the float32 mean of equal rewards need not equal them, and a tiny residue over eps is
not zero. Deviations have the divisor n - 1. Rewards that are all equal give exact zeros everywhere but in `none`.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from databus.codec import Array
from databus.groups import Group
from learner.advantage_function import AdvantageFunction, call_advantage_function

EPS = 1e-6
"""Added to deviations, as verl does; TRL 1.16 adds 1e-4."""


def group_advantages(rewards: Tensor, scale: bool = True, eps: float = EPS) -> Tensor:
    """Centre (and scale) rewards within each prompt group: A = (r - mean) / (std + eps); without `scale`, r - mean.

    Args: rewards: [N, G], unitless. scale: divide by the group's deviation; False is the variant without the
        difficulty bias (Dr. GRPO). eps: added to the deviation.
    Returns: float32 [N, G].
    Raises: ValueError if rewards is not [N, G] or G < 2.
    Source: DeepSeekMath (arXiv:2402.03300), outcome supervision; Dr. GRPO (arXiv:2503.20783). TRL: `scale_rewards`
        `group` and `none`.
    """
    centred = _centred(rewards)
    return (centred / (_deviation(rewards) + eps) if scale else centred).float()


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the group's other rewards = G / (G - 1) · (r_i - mean).

    Args: rewards: [N, G]. Returns: float32 [N, G]. Raises: ValueError if rewards is not [N, G] or G < 2.
    Source: RLOO, Ahmadian et al. (arXiv:2402.14740). TRL 1.16's GRPOTrainer has no such baseline.
    """
    size = rewards.shape[-1]
    return (_centred(rewards) * (size / max(1, size - 1))).float()


def batch_advantages(rewards: Tensor, centre_groups: bool = False, eps: float = EPS) -> Tensor:
    """Normalise over the whole batch: A = (r - mean) / (std + eps), both over all N · G completions.

    Args: rewards: [N, G]. centre_groups: first take each group's mean off its rewards (the `_baseline` variant).
    Returns: float32 [N, G]. Raises: ValueError if rewards is not [N, G] or G < 2.
    Source: REINFORCE++ (arXiv:2501.03262). TRL has no such estimator: its `scale_rewards=batch` is `lite_ppo`.
    """
    values = _centred(rewards) if centre_groups else _checked(rewards).double()
    return _batch_normalised(values, eps).float()


def mixed_advantages(rewards: Tensor, eps: float = EPS) -> Tensor:
    """The group's mean with the batch's deviation: A = (r - mean of its group) / (std of the batch's rewards + eps).

    Args: rewards: [N, G]. Returns: float32 [N, G]. Raises: ValueError if rewards is not [N, G] or G < 2.
    Source: Lite PPO, "Part I: Tricks or Traps?" (arXiv:2508.08221). TRL: `scale_rewards=batch`.
    """
    return (_centred(rewards) / (rewards.double().std() + eps)).float()


def decoupled_advantages(parts: Tensor, eps: float = EPS) -> Tensor:
    """Each part of the reward normalised within its group; their sum normalised over the batch.

    Args: parts: [N, G, P]. Returns: float32 [N, G]. Raises: ValueError if parts is not [N, G, P] or G < 2.
    Source: GDPO (arXiv:2601.05242). TRL: `multi_objective_aggregation=normalize_then_sum`, all weights 1.
    """
    if parts.ndim != 3:
        raise ValueError(f"parts of rewards must be [N, G, P], got shape {tuple(parts.shape)}")
    total = torch.zeros(parts.shape[:2], dtype=torch.float64)
    for part in parts.unbind(dim=2):
        total += _centred(part) / (_deviation(part) + eps)
    return _batch_normalised(total, eps).float()


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": group_advantages,
    "dr_grpo": lambda rewards: group_advantages(rewards, scale=False),
    "rloo": leave_one_out_advantages,
    "reinforce++": batch_advantages,
    "reinforce++_baseline": lambda rewards: batch_advantages(rewards, centre_groups=True),
    "lite_ppo": mixed_advantages,
    "none": lambda rewards: rewards.float(),
}


def estimate_advantages(
    groups: Sequence[Group], estimator: str, function: AdvantageFunction | None = None
) -> list[Array]:
    """Advantages of every group of a batch: float32 [G], or [T], one a token, where a function gives those.

    Args: estimator: as in `AdvantageConfig`. function: the user's, which `estimator` names.
    Raises: ValueError, in one line: groups of different sizes or parts, a group of one, a function that fails.
    """
    if function is not None:
        return [call_advantage_function(function, group, estimator) for group in groups]
    if estimator == "gdpo":
        advantages = decoupled_advantages(_stack([_parts(group) for group in groups]))
    else:
        advantages = ESTIMATORS[estimator](_stack([group.rewards for group in groups]))
    return list(advantages.numpy())


def _parts(group: Group) -> Array:
    """[G, P]; a reward without parts is its own only part."""
    return group.reward_parts if group.reward_parts.shape[1] else group.rewards[:, None]


def _stack(rewards: Sequence[Array]) -> Tensor:
    shapes = sorted({array.shape for array in rewards})
    if len(shapes) > 1:
        raise ValueError(f"groups of a batch differ in completions or parts of rewards: {shapes[0]} and {shapes[1]}")
    return torch.from_numpy(np.stack(rewards))


def _checked(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, G] with G >= 2, got shape {tuple(rewards.shape)}")
    return rewards


def _centred(rewards: Tensor) -> Tensor:
    rewards64 = _checked(rewards).double()
    return rewards64 - rewards64.mean(dim=1, keepdim=True)


def _deviation(rewards: Tensor) -> Tensor:
    return rewards.double().std(dim=1, keepdim=True)


def _batch_normalised(values: Tensor, eps: float) -> Tensor:
    return (values - values.mean()) / (values.std() + eps)
