"""A user's own advantages (`learner.advantage.estimator=PATH.py:FUNCTION`), and credit for parts of a completion."""

from collections.abc import Callable

import numpy as np

from databus.codec import Array
from databus.groups import Group

AdvantageFunction = Callable[[Group], Array]


def call_advantage_function(function: AdvantageFunction, group: Group, name: str) -> Array:
    """What the function gives for a group: float32 [G], or [T].

    Raises: ValueError, in one line, if it raises, or returns another shape or a number that is not finite.
    """
    try:
        advantages = np.asarray(function(group), dtype=np.float32)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        raise ValueError(f"learner.advantage.estimator={name}: it raised {type(error).__name__}: {text}") from error
    if advantages.shape not in ((group.size,), (group.num_tokens,)):
        raise ValueError(
            f"learner.advantage.estimator={name}: returned shape {advantages.shape}, expected ({group.size},), one a "
            f"completion, or ({group.num_tokens},), one a token"
        )
    if not np.isfinite(advantages).all():
        raise ValueError(f"learner.advantage.estimator={name}: returned a number that is not finite")
    return advantages


def credit_tokens(group: Group, parts: Array, ends: Array) -> Array:
    """Credit each part of the rewards to the tokens that were sampled before the part was settled.

    A_t = sum over parts p with t < end_p of (r_p - mean of r_p over the group): no token is credited for what was
    already decided when it was sampled. With every end at the completion's end it is `dr_grpo`.

    Args: parts: [G, P], rewards of the parts. ends: [G, P], how many tokens of the completion lead up to each.
    Returns: float32 [T], the completions' tokens end to end.
    Source: reward-to-go, the causal form of REINFORCE (Sutton and Barto 2018, §13.3), with a baseline for each part.
    """
    centred = parts.astype(np.float64) - parts.mean(axis=0, dtype=np.float64)
    places = np.concatenate([np.arange(length) for length in group.lengths])
    owners = np.repeat(np.arange(group.size), group.lengths)
    return (centred[owners] * (places[:, None] < ends[owners])).sum(axis=1).astype(np.float32)
