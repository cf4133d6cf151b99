"""Which workers are too slow, as functions of everybody's rates."""

import statistics

from hypothesis import given
from hypothesis import strategies as st

from databus.slowness import lagging, lagging_since, slowest

names = st.text("abcdefgh", min_size=1, max_size=2)
rates = st.dictionaries(names, st.floats(0, 1e6), max_size=8)
fractions = st.floats(0, 0.99)


def test_one_of_four() -> None:
    assert lagging({"a": 100, "b": 110, "c": 90, "d": 25}, 0.3) == {"d"}
    assert lagging({"a": 100, "b": 110, "c": 90, "d": 35}, 0.3) == set()


def test_of_two_nobody_is_slow() -> None:
    assert lagging({"a": 100, "b": 1}, 0.3) == set()
    assert lagging({"a": 100, "b": 1, "c": 100}, 0.3) == {"b"}


@given(rates, fractions)
def test_whoever_lags_is_below_the_others_median(rates: dict[str, float], fraction: float) -> None:
    for name in lagging(rates, fraction):
        assert rates[name] < fraction * statistics.median([rate for other, rate in rates.items() if other != name])


@given(rates, fractions)
def test_most_never_lag(rates: dict[str, float], fraction: float) -> None:
    """So the run keeps most of its workers, whatever they report."""
    assert len(lagging(rates, fraction)) <= len(rates) / 2


@given(rates, fractions, st.integers(-20, 20).map(lambda power: 2.0**power))
def test_units_do_not_matter(rates: dict[str, float], fraction: float, unit: float) -> None:
    whole = {name: float(round(rate)) for name, rate in rates.items()}
    assert lagging({name: rate * unit for name, rate in whole.items()}, fraction) == lagging(whole, fraction)


@given(rates, fractions, names)
def test_a_faster_worker_lags_no_sooner(rates: dict[str, float], fraction: float, name: str) -> None:
    if name in rates and name not in lagging(rates, fraction):
        assert name not in lagging(rates | {name: rates[name] * 2}, fraction)


def test_nobody_is_slow_where_that_is_switched_off() -> None:
    assert lagging({"a": 100, "b": 100, "c": 0}, 0) == set()


@given(st.lists(st.sets(names), min_size=1, max_size=20))
def test_time_counts_from_the_last_moment_without_lag(looks: list[set[str]]) -> None:
    since: dict[str, float] = {}
    for now, lagging_now in enumerate(looks):
        since = lagging_since(since, lagging_now, now)
    assert since.keys() == looks[-1]
    for name, start in since.items():
        assert all(name in look for look in looks[int(start) :])
        assert start == 0 or name not in looks[int(start) - 1]


@given(st.dictionaries(names, st.floats(0, 100), min_size=1), st.floats(0, 200), st.floats(0.1, 50))
def test_one_at_a_time_and_not_before_its_time(since: dict[str, float], now: float, slow_s: float) -> None:
    rates = {name: float(len(name)) for name in since}
    name = slowest(since, rates, now, slow_s)
    due = [each for each, start in since.items() if now - start >= slow_s]
    assert (name is None) == (not due)
    if name is not None:
        assert name in due and all(rates[name] <= rates[each] for each in due)
