"""The order of problems: batches that mix short, medium and long in fixed shares, every problem once a round."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from databus.codec import Array

NUM_CLASSES = 3

DrawPool = Callable[[int, np.random.Generator], Array]
"""(round, random numbers) -> int [n] the problems of that round; a round is an epoch unless a curriculum says else."""
Predict = Callable[[Array], Array]
"""int [n] problems -> float [n] predicted lengths."""


class MixerState(Struct, kw_only=True):
    """drawn: problems given out so far. remaining, block: int32, little-endian; the block in its order."""

    round: int
    drawn: int
    remaining: bytes
    block: bytes


class Mixer:
    """Gives out one problem after another.

    A block is what is drawn together: it ends where a batch's worth of problems ends, or the round. Its problems are
    taken from the thirds by predicted length of what remains of the round, and given out longest first, so that the
    long ones of a batch are begun first and nobody waits for one that was begun last.
    """

    def __init__(self, batch_groups: int, shares: Sequence[float], seed: int, pool: DrawPool, predict: Predict) -> None:
        """Args: shares: of short, medium and long, as checked by `check_shares`."""
        self._batch_groups = batch_groups
        self._shares = check_shares(shares)
        self._seed = seed
        self._pool = pool
        self._predict = predict
        self._round = -1
        self._drawn = 0
        self._remaining = np.zeros(0, np.int32)
        self._block = np.zeros(0, np.int32)

    def draw(self) -> int:
        """The next problem."""
        if not len(self._block):
            self._begin_block()
        problem, self._block = int(self._block[0]), self._block[1:]
        self._drawn += 1
        return problem

    def save(self) -> MixerState:
        return MixerState(
            round=self._round,
            drawn=self._drawn,
            remaining=self._remaining.astype("<i4").tobytes(),
            block=self._block.astype("<i4").tobytes(),
        )

    def load(self, state: MixerState) -> None:
        self._round, self._drawn = state.round, state.drawn
        self._remaining = np.frombuffer(state.remaining, "<i4").astype(np.int32)
        self._block = np.frombuffer(state.block, "<i4").astype(np.int32)

    def _begin_block(self) -> None:
        # From what has been drawn alone, so that a resumed run draws what the uninterrupted one would have.
        rng = np.random.default_rng([self._seed, self._drawn])
        if not len(self._remaining):
            self._round += 1
            self._remaining = np.asarray(self._pool(self._round, rng), np.int32)
            assert len(self._remaining), "a round without problems"
        size = self._batch_groups - self._drawn % self._batch_groups
        lengths = self._predict(self._remaining)
        places = choose_mixed(lengths, size, self._shares, rng)
        self._block = self._remaining[places]
        self._remaining = np.delete(self._remaining, places)


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Raises: ValueError, one line, unless there are three, none negative, that add up to 1."""
    if len(shares) != NUM_CLASSES or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"scheduling.shares is {list(shares)}: expected shares of short, medium and long that add up to 1"
        )
    return tuple(shares)


def choose_mixed(lengths: Array, size: int, shares: Sequence[float], rng: np.random.Generator) -> Array:
    """Places in `lengths` [n] of min(n, size) members, drawn from its thirds in these shares, longest first.

    Members of the same length are in random order, so that an unknown length says nothing.
    """
    order = np.lexsort((rng.random(len(lengths)), lengths))
    if len(order) <= size:
        return order[::-1]
    thirds = np.array_split(order, NUM_CLASSES)
    counts = class_counts(size, shares, [len(third) for third in thirds])
    chosen = [rng.choice(third, count, replace=False) for third, count in zip(thirds, counts, strict=True)]
    places = np.zeros(len(order), bool)
    places[np.concatenate(chosen)] = True
    return order[places[order]][::-1]


def class_counts(size: int, shares: Sequence[float], available: Sequence[int]) -> list[int]:
    """How many of each class: within one of its share of `size`, unless a class has not so many; sums to `size`.

    Args: available: members of each class, at least `size` together.
    """
    exact = [share * size for share in shares]
    counts = [min(int(amount), limit) for amount, limit in zip(exact, available, strict=True)]
    while (missing := size - sum(counts)) > 0:
        open_classes = [index for index, limit in enumerate(available) if counts[index] < limit]
        nearest = sorted(open_classes, key=lambda index: counts[index] - exact[index])
        for index in nearest[:missing]:
            counts[index] += 1
    return counts
