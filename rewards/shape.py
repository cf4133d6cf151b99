"""The built-in `format` and `length` rewards: how an answer looks, not what it says."""

import re
from collections.abc import Callable

from rewards.config import RewardConfig
from rewards.sample import Sample


def format_reward(config: RewardConfig) -> Callable[[Sample], float]:
    """1 where the whole completion matches `reward.format.pattern`. Raises: ValueError for a pattern that is none."""
    try:
        pattern = re.compile(config.format.pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward.format.pattern={config.format.pattern!r} is no regular expression: {error}") from None
    return lambda sample: float(pattern.fullmatch(sample.completion) is not None)


def length_reward(config: RewardConfig) -> Callable[[Sample], float]:
    """1 within `reward.length`'s bounds, falling to 0 over `slack_tokens` on either side."""
    low, high, slack = config.length.min_tokens, config.length.max_tokens, config.length.slack_tokens
    if low > high:
        raise ValueError(f"reward.length.min_tokens is {low} and max_tokens {high}: min must not be above max")
    return lambda sample: max(0.0, 1.0 - max(low - sample.num_tokens, sample.num_tokens - high, 0) / slack)
