from collections.abc import Sequence

import numpy as np

from databus.scheduling import Load, MostCredit, Placement
from rollout.scheduling.placement import LeastRemaining


def load(predicted: int = 0, reported: int = 0, speed: float = 0.0, free: int = 1) -> Load:
    return Load(predicted, reported, speed, free)


def choose(placement: Placement, loads: Sequence[Load]) -> int:
    """Who gets the next group."""
    rank = placement.ranking(loads)
    return min(range(len(loads)), key=lambda index: rank(loads[index]))


def test_least_remaining_work_is_chosen() -> None:
    assert choose(LeastRemaining(), [load(900), load(400), load(700)]) == 1
    assert choose(LeastRemaining(), [load(900, reported=800), load(400)]) == 0


def test_a_slow_worker_gets_less() -> None:
    assert choose(LeastRemaining(), [load(900, speed=1000), load(500, speed=100)]) == 0
    assert choose(LeastRemaining(), [load(900, speed=1000), load(500, speed=0)]) == 1, (
        "speeds are compared only if all are known"
    )


def test_where_nothing_is_known_credit_decides() -> None:
    loads = [load(free=2), load(free=5), load(free=5)]
    assert choose(LeastRemaining(), loads) == choose(MostCredit(), loads) == 1


def test_reports_beyond_the_prediction_do_not_count() -> None:
    assert choose(LeastRemaining(), [load(100, reported=900, free=1), load(0, free=2)]) == 1


def test_work_is_spread_better_than_by_count() -> None:
    """Long-tailed groups, longest first, to four workers: the busiest one has hardly more than its quarter."""
    tokens = np.sort(np.random.default_rng(0).lognormal(5, 1.2, 200))[::-1].astype(int)
    given = np.zeros(4, int)
    for each in tokens:
        given[choose(LeastRemaining(), [load(int(total)) for total in given])] += each
    assert given.max() < 1.01 * given.mean()
