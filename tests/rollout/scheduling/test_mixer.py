from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.scheduling.mixer import Mixer, check_shares, choose_mixed, class_counts

THIRDS = (1 / 3, 1 / 3, 1 / 3)

shares = st.tuples(*[st.integers(0, 10)] * 3).filter(any).map(lambda parts: tuple(part / sum(parts) for part in parts))


def make_mixer(num_problems: int, batch: int, seed: int = 0, shares: tuple[float, ...] = THIRDS) -> Mixer:
    lengths = np.random.default_rng(99).lognormal(5, 1, num_problems)
    everything = np.arange(num_problems, dtype=np.int32)
    return Mixer(batch, shares, seed, lambda number, rng: everything, lambda problems: lengths[problems])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 5), shares)
def test_every_problem_once_an_epoch(num_problems: int, batch: int, seed: int, wanted: tuple[float, ...]) -> None:
    mixer = make_mixer(num_problems, batch, seed, wanted)
    for _ in range(3):
        assert sorted(mixer.draw() for _ in range(num_problems)) == list(range(num_problems))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 30), st.integers(0, 400), st.integers(0, 5))
def test_a_resumed_mixer_goes_on_as_the_uninterrupted_one(num: int, batch: int, drawn: int, seed: int) -> None:
    uninterrupted, resumed = make_mixer(num, batch, seed), make_mixer(num, batch, seed)
    for _ in range(drawn):
        uninterrupted.draw()
    resumed.load(uninterrupted.save())
    assert [resumed.draw() for _ in range(300)] == [uninterrupted.draw() for _ in range(300)]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 64), st.integers(0, 300), shares, st.integers(0, 100))
def test_shares_within_one_of_the_target(size: int, more: int, wanted: tuple[float, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(5, 1, 3 * size + more)
    places = choose_mixed(lengths, size, wanted, rng)
    assert len(set(places.tolist())) == size
    assert (np.diff(lengths[places]) <= 0).all(), "longest first"
    thirds = np.array_split(np.argsort(lengths), 3)
    for share, third in zip(wanted, thirds, strict=True):
        assert abs(np.isin(places, third).sum() - share * size) < 1


def test_batches_of_an_epoch_hold_equal_thirds_of_the_data_set() -> None:
    lengths = np.random.default_rng(1).lognormal(5, 1, 480)
    everything = np.arange(480, dtype=np.int32)
    mixer = Mixer(16, THIRDS, 0, lambda number, rng: everything, lambda problems: lengths[problems])
    third_of = np.empty(480, int)
    third_of[np.argsort(lengths)] = np.arange(480) // 160
    for _ in range(30):
        batch = [mixer.draw() for _ in range(16)]
        counts = Counter(third_of[batch].tolist())
        assert all(3 <= counts[third] <= 8 for third in range(3)), counts


def test_an_epoch_that_ends_inside_a_batch_is_filled_up_from_the_next() -> None:
    mixer = make_mixer(10, 4)
    drawn = [mixer.draw() for _ in range(20)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert mixer.save().drawn == 20


def test_fewer_problems_than_a_batch() -> None:
    mixer = make_mixer(3, 16)
    counts = Counter(mixer.draw() for _ in range(16))
    assert sorted(counts) == [0, 1, 2] and set(counts.values()) == {5, 6}


def test_seeds_differ_and_repeat() -> None:
    def first(seed: int) -> list[int]:
        mixer = make_mixer(100, 10, seed)
        return [mixer.draw() for _ in range(30)]

    assert first(3) == first(3) != first(4)


def test_unknown_lengths_are_no_order() -> None:
    everything = np.arange(300, dtype=np.int32)
    mixer = Mixer(30, THIRDS, 0, lambda number, rng: everything, lambda problems: np.zeros(len(problems)))
    drawn = [mixer.draw() for _ in range(300)]
    assert abs(np.corrcoef(drawn, range(300))[0, 1]) < 0.2


@pytest.mark.parametrize("wrong", [(0.5, 0.5, 0.5), (1.5, -0.5, 0.0), (0.5, 0.5)])
def test_shares_that_do_not_add_up(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^scheduling.shares is \[.*add up to 1$"):
        check_shares(wrong)


def test_a_class_that_runs_short_is_made_up_for() -> None:
    assert class_counts(10, (0.0, 0.0, 1.0), [4, 4, 4]) == [3, 3, 4]
    assert class_counts(16, THIRDS, [99, 99, 99]) in ([5, 5, 6], [6, 5, 5], [5, 6, 5])
