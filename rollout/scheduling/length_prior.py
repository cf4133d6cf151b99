"""Expected length of a completion before its problem has been seen: from the data set as a whole and the prompt."""

import math

import numpy as np
from msgspec import Struct

from databus.codec import Array

RIDGE = 0.05
"""Added to the variance of log prompt length: where prompts hardly differ, the slope is not to be trusted."""


class PriorState(Struct, kw_only=True):
    """Exponentially weighted sums over groups. x: log prompt length; y: log mean length of the group's completions.

    log_upper, log_max: sums of the logs of upper quantile / mean and of longest / mean within a group.
    """

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    log_upper: float = 0.0
    log_max: float = 0.0


class LengthPrior:
    """Least squares of log length on log prompt length that forgets: the policy, and with it all lengths, changes."""

    def __init__(self, memory_groups: float, state: PriorState | None = None) -> None:
        """Args: memory_groups: an observation counts e times less once so many more have come."""
        self._keep = math.exp(-1 / memory_groups)
        self.state = state or PriorState()

    @property
    def seen(self) -> bool:
        return self.state.weight > 0

    def observe(self, log_prompt: float, log_mean: float, log_upper: float, log_max: float) -> None:
        """Take one group; the arguments are as in `PriorState`."""
        state, keep = self.state, self._keep
        state.weight = keep * state.weight + 1
        state.x = keep * state.x + log_prompt
        state.y = keep * state.y + log_mean
        state.xx = keep * state.xx + log_prompt**2
        state.xy = keep * state.xy + log_prompt * log_mean
        state.log_upper = keep * state.log_upper + log_upper
        state.log_max = keep * state.log_max + log_max

    def log_mean(self, log_prompt: Array) -> Array:
        """[n] log of expected completion tokens for prompts of log lengths [n]; zeros while nothing is seen."""
        if not self.seen:
            return np.zeros_like(log_prompt, np.float64)
        state = self.state
        mean_x, mean_y = state.x / state.weight, state.y / state.weight
        variance = max(0.0, state.xx / state.weight - mean_x**2)
        slope = (state.xy / state.weight - mean_x * mean_y) / (variance + RIDGE)
        return mean_y + slope * (log_prompt - mean_x)

    def spread(self) -> tuple[float, float]:
        """(log of upper quantile / mean, log of longest / mean) of a group, over the data set."""
        weight = max(self.state.weight, 1e-9)
        return self.state.log_upper / weight, self.state.log_max / weight
