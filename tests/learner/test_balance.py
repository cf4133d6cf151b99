from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import make_sequence

from learner.balance import balance, sequence_cost

costs_lists = st.lists(st.integers(1, 10_000).map(float), max_size=40)


def loads(costs: list[float], shares: int) -> list[float]:
    return [sum(costs[item] for item in items) for items in balance(costs, shares)]


def test_differencing_by_hand() -> None:
    """8-7 -> 1, 6-5 -> 1, 4 and 1 -> 3, 3 and 1 -> 2; longest first to the lightest would give 17 and 13."""
    assert sorted(loads([8, 7, 6, 5, 4], 2)) == [14, 16]
    assert balance([8, 7, 6, 5, 4], 2) == [[0, 2], [1, 3, 4]] or balance([8, 7, 6, 5, 4], 2) == [[1, 3, 4], [0, 2]]


def test_three_shares_by_hand() -> None:
    """(9 0 0) and (7 0 0) -> (9 7 0); with (5 0 0) -> (9 7 5); with (4 0 0) -> (9 9 7)."""
    assert sorted(loads([9, 7, 5, 4, 0], 3)) == [7, 9, 9]


@settings(max_examples=60)
@given(costs_lists, st.integers(1, 8))
def test_every_item_once_and_shares_differ_by_no_more_than_an_item(costs: list[float], shares: int) -> None:
    split = balance(costs, shares)
    assert len(split) == shares
    assert sorted(item for items in split for item in items) == list(range(len(costs)))
    assert all(items == sorted(items) for items in split)
    assert split == balance(list(costs), shares)
    assert max(loads(costs, shares)) - min(loads(costs, shares)) <= max(costs, default=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60).map(float), min_size=1, max_size=7), st.integers(2, 3))
def test_never_worse_than_the_proved_bound(costs: list[float], shares: int) -> None:
    best = min(
        max(sum(cost for cost, place in zip(costs, places, strict=True) if place == share) for share in range(shares))
        for places in product(range(shares), repeat=len(costs))
    )
    assert max(loads(costs, shares)) <= (4 / 3 - 1 / (3 * shares)) * best + 1e-9


def test_long_tails_are_balanced_to_a_thousandth() -> None:
    costs = np.random.default_rng(0).lognormal(5, 1.2, 512).tolist()
    share = sum(costs) / 8
    assert max(costs) < share
    assert max(loads(costs, 8)) <= 1.001 * share


def test_cost_of_a_sequence_by_hand() -> None:
    assert sequence_cost(make_sequence(100), attention_tokens=400) == pytest.approx(125)
    assert sequence_cost(make_sequence(100), attention_tokens=float("inf")) == 100
