"""A soft penalty on completions that come near their limit, taken off rewards before advantages are made of them."""

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np

from databus.codec import Array
from databus.groups import Group


def overlong_penalties(lengths: Array, limit_tokens: int, cache_tokens: int) -> Array:
    """0 up to limit - cache tokens, then rising in a straight line to 1 at the limit, and 1 beyond it; float32 [G].

    Args: lengths: int [G], tokens of completions. cache_tokens: width of the slope; 0 is a step beyond the limit.
    Source: DAPO (arXiv:2503.14476), soft overlong punishment: L_max is limit_tokens, L_cache cache_tokens. TRL:
        `get_soft_overlong_punishment`.
    """
    over = lengths.astype(np.int64) - (limit_tokens - cache_tokens)
    return np.clip(over / max(1, cache_tokens), 0.0, 1.0).astype(np.float32)


def without_overlong(groups: Items[Group], limit_tokens: int, cache_tokens: int) -> list[Group]:
    """Groups with the penalty taken off their rewards; as they are where limit_tokens is 0.

    The journal, difficulty, filters and `reward/mean` keep what the reward function said: as in DAPO, whether a problem
    teaches anything is decided by answers, not by their lengths.
    """
    if limit_tokens == 0:
        return list(groups)
    return [
        replace(group, rewards=group.rewards - overlong_penalties(group.lengths, limit_tokens, cache_tokens))
        for group in groups
    ]
