"""Stretches of time against a plain count of moments."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.report.series import binned
from echelon.report.spans import Spans, merged, shares

END = 40
stretches = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=12)


def made(pairs: list[tuple[int, int]]) -> Spans:
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return merged(array[:, 0], array[:, 1])


def moments(pairs: list[tuple[int, int]]) -> set[int]:
    """Unit intervals that are covered."""
    return {moment for start, end in pairs for moment in range(start, end)}


def moments_of(spans: Spans) -> set[int]:
    return moments([(int(a), int(b)) for a, b in zip(spans.starts, spans.ends, strict=True)])


@settings(deadline=None)
@given(stretches, stretches)
def test_spans_are_the_moments_that_they_cover(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> None:
    first, second = made(one), made(two)
    assert moments_of(first) == moments(one) and first.total() == len(moments(one))
    assert (first.starts[1:] > first.ends[:-1]).all()
    assert moments_of(first.within(second)) == moments(one) & moments(two)
    assert moments_of(first.gaps(0, END)) == set(range(END)) - moments(one)
    edges = np.arange(0, END + 1, 4.0)
    expected = [len(moments(one) & set(range(int(edge), int(edge) + 4))) / 4 for edge in edges[:-1]]
    assert np.allclose(shares(first, edges), expected)


def test_a_long_series_keeps_its_extremes_and_its_mean() -> None:
    values = np.sin(np.arange(9999.0))
    values[1234], values[7777] = 50.0, -50.0
    series = binned(np.arange(9999.0), values, 100)
    assert len(series) == 100 and series.per_bin == 100
    assert series.high.max() == 50.0 and series.low.min() == -50.0
    assert np.isclose(np.average(series.mean, weights=[100] * 99 + [99]), values.mean(), atol=1e-3)
    short = binned(np.arange(5.0), values[:5], 100)
    assert short.per_bin == 1 and (short.mean == values[:5]).all()
