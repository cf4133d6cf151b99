"""Which workers are too slow to keep: pure functions of everybody's tokens a second."""

import statistics
from collections.abc import Mapping, Set

MIN_WORKERS = 3
"""Of two, nobody can say which is the odd one."""


def lagging(rates: Mapping[str, float], fraction: float) -> set[str]:
    """Those whose rate is below `fraction` of the median of the others'; nobody among fewer than three.

    Args: rates: tokens a second, of the time in which a worker had work.
    """
    if len(rates) < MIN_WORKERS:
        return set()
    return {name for name in rates if rates[name] < fraction * median_of_others(rates, name)}


def median_of_others(rates: Mapping[str, float], name: str) -> float:
    """The lower one where there are two: so never more than half of the workers lag."""
    return statistics.median_low([rate for other, rate in rates.items() if other != name])


def lagging_since(before: Mapping[str, float], now_lagging: Set[str], now: float) -> dict[str, float]:
    """Since when each has lagged without a break. Args: before: the same, at the last look. now: seconds."""
    return {name: before.get(name, now) for name in now_lagging}


def slowest(since: Mapping[str, float], rates: Mapping[str, float], now: float, slow_s: float) -> str | None:
    """Of those who have lagged for `slow_s` the one with the lowest rate: one at a time, as it changes the median."""
    slow = [name for name, start in since.items() if now - start >= slow_s]
    return min(slow, key=lambda name: (rates[name], name), default=None)
