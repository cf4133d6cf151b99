"""The allocation against a search over all of them, and the logarithmic budget by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.drafting.budget import BINS, LEAST_GAIN, allocate, logarithmic_budget


def rate(survival: list[list[float]], chosen: tuple[int, ...], cost: tuple[float, float, float]) -> float:
    """Expected tokens a second of a round with so many draft tokens a request."""
    base, request, token = cost
    expected = len(survival) + sum(sum(row[:n]) for row, n in zip(survival, chosen, strict=True))
    return expected / (base + request * len(survival) + token * (len(survival) + sum(chosen)))


def allocated(survival: list[list[float]], cost: tuple[float, float, float]) -> tuple[int, ...]:
    width = max(1, max(len(row) for row in survival))
    table = np.zeros((len(survival), width), np.float32)
    for row, values in enumerate(survival):
        table[row, : len(values)] = values
    num = np.array([len(row) for row in survival], np.int32)
    slots = np.arange(len(survival), dtype=np.int32)
    allocate(slots, table, np.ones(len(survival), np.float32), num, *cost, np.zeros(BINS, np.int64), np.zeros(BINS))
    return tuple(num.tolist())


rows = st.lists(st.floats(0.05, 0.999), max_size=3).map(lambda chances: np.cumprod(chances).tolist())


@settings(deadline=None, max_examples=150)
@given(
    survival=st.lists(rows, min_size=1, max_size=4),
    cost=st.tuples(st.floats(1e-4, 1e-1), st.floats(0, 1e-3), st.floats(1e-6, 1e-2)),
)
def test_no_allocation_is_much_better(survival: list[list[float]], cost: tuple[float, float, float]) -> None:
    chosen = allocated(survival, cost)
    assert all(n <= len(row) for n, row in zip(chosen, survival, strict=True))
    best = max(rate(survival, each, cost) for each in itertools.product(*(range(len(row) + 1) for row in survival)))
    # Survival is taken in classes of 1/64, and gains below LEAST_GAIN are left alone.
    assert rate(survival, chosen, cost) * LEAST_GAIN * (1 + 4 / BINS) >= best


def test_where_tokens_cost_as_much_as_steps_nothing_is_drafted() -> None:
    assert allocated([[0.9, 0.8], [0.5]], (0.0, 0.0, 1e-3)) == (0, 0)


def test_where_tokens_cost_nothing_everything_is_drafted() -> None:
    assert allocated([[0.9, 0.8], [0.05]], (1e-2, 0.0, 0.0)) == (2, 1)


def test_a_request_that_holds_its_group_up_gets_more() -> None:
    table = np.array([[0.5, 0.25], [0.5, 0.25]], np.float32)
    num = np.array([2, 2], np.int32)
    slots = np.arange(2, dtype=np.int32)
    allocate(
        slots, table, np.array([1.5, 1.0], np.float32), num, 1e-2, 0.0, 3.5e-3, np.zeros(BINS, np.int64), np.zeros(BINS)
    )
    assert num[0] > num[1]


@pytest.mark.parametrize(
    ("predicted", "budget"), [(50, 0), (100, 0), (200, 5), (400, 11), (800, 16), (5000, 16), (0, 8)]
)
def test_logarithmic_budget(predicted: int, budget: int) -> None:
    assert logarithmic_budget(predicted, 200.0, 16) == budget
