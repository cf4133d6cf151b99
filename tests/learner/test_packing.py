import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_script import make_groups

from learner.packing import MicroBatch, pack_rows, plan_microbatches
from learner.sequences import Sequence, sequences_of


def sequence_of(
    token_ids: list[int], targets: list[int], logprobs: list[float], lag: int, start: int, advantages: list[float]
) -> Sequence:
    ids, places = np.array(token_ids), np.array(targets)
    return Sequence(ids, places, np.array(logprobs, np.float32), lag, start, np.array(advantages, np.float32))


def make_sequence(num_inputs: int, advantage: float = 1.0, mark: int = 0) -> Sequence:
    return Sequence(
        token_ids=np.full(num_inputs + 1, mark, np.int64),
        targets=np.array([num_inputs]),
        logprobs=np.array([-1.0], np.float32),
        lag=0,
        start=mark,
        advantages=np.array([advantage], np.float32),
    )


def test_microbatch_by_hand() -> None:
    first = sequence_of([1, 2, 3, 4], [2, 3], [-1, -2], 1, 0, [0.5, 0.25])
    second = sequence_of([8, 9], [1], [-3], 0, 2, [-1.0])
    third = replace(sequence_of([5, 6, 7], [2], [-4], 3, 3, [2.0]), weight=0.1)
    (microbatch,) = plan_microbatches([first, second, third], rank=0, world_size=1, max_tokens=100)
    # Widest first: rows [first], [third, second]; each row 3 wide, no room lost.
    assert microbatch.input_ids.tolist() == [[1, 2, 3], [5, 6, 8]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert microbatch.loss_positions.tolist() == [1, 2, 4, 5]
    assert microbatch.targets.tolist() == [3, 4, 7, 9]
    assert microbatch.places.tolist() == [0, 1, 3, 2]
    tokens = microbatch.tokens
    assert tokens.sampled.tolist() == [-1, -2, -4, -3]
    assert tokens.advantages.tolist() == [0.5, 0.25, 2.0, -1.0]
    assert tokens.weights.tolist() == pytest.approx([1.0, 1.0, 0.1, 1.0])
    assert tokens.lags.tolist() == [1, 1, 3, 0]
    assert (tokens.owners.tolist(), tokens.num_sequences) == ([0, 0, 1, 2], 3)
    assert tokens.recomputed is None and tokens.reference is None
    assert (microbatch.num_tokens, microbatch.needs_gradient) == (6, True)


def test_what_frozen_models_say_is_packed_like_the_rest() -> None:
    first = replace(sequence_of([1, 2, 3], [1, 2], [-1, -2], 0, 0, [1, 1]), recomputed=np.array([-5, -6]))
    second = replace(sequence_of([1, 2, 3, 4], [3], [-3], 0, 2, [1]), recomputed=np.array([-7]))
    (microbatch,) = plan_microbatches([first, second], rank=0, world_size=1, max_tokens=100)
    assert microbatch.tokens.recomputed is not None
    assert microbatch.tokens.recomputed.tolist() == [-7, -5, -6]


def test_padding_goes_on_with_the_positions_before_it() -> None:
    (rows,) = pack_rows([make_sequence(5), make_sequence(3), make_sequence(4)], max_tokens=20)
    assert [[sequence.num_inputs for sequence in row] for row in rows] == [[5], [4], [3]]
    (microbatch,) = plan_microbatches([make_sequence(5), make_sequence(3)], 0, 1, 20)
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


sequence_lists = st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.0, 1.0])), max_size=60)


@settings(max_examples=60)
@given(sequence_lists, st.integers(1, 4), st.integers(1, 200))
def test_every_token_is_packed_once_and_ranks_match(
    sizes: list[tuple[int, float]], world_size: int, max_tokens: int
) -> None:
    sequences = [make_sequence(size, advantage, mark) for mark, (size, advantage) in enumerate(sizes)]
    plans = [plan_microbatches(sequences, rank, world_size, max_tokens) for rank in range(world_size)]

    assert len({tuple(microbatch.needs_gradient for microbatch in plan) for plan in plans}) == 1
    assert plans[0][0].needs_gradient
    longest = max((size for size, _ in sizes), default=1)
    packed = [microbatch for plan in plans for microbatch in plan]
    assert all(microbatch.input_ids.numel() <= max(max_tokens, longest) for microbatch in packed)
    assert sum(microbatch.num_tokens for microbatch in packed) == sum(size for size, _ in sizes)
    assert sorted(mark for microbatch in packed for mark in microbatch.targets.tolist()) == list(range(len(sizes)))
    for microbatch in packed:
        needed = microbatch.tokens.advantages != 0
        assert needed.all() if microbatch.needs_gradient else not needed.any()


def test_plan_is_deterministic() -> None:
    sequences = [replace(s, regularised=True) for s in sequences_of(make_groups(0), step=0)]
    for ours, theirs in zip(*[plan_microbatches(sequences, 1, 2, 64) for _ in range(2)], strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.loss_positions, theirs.loss_positions)


def test_ranks_get_equal_costs_not_equal_tokens() -> None:
    """One of 400 costs 800 where attention counts, as much as six and a half of 100."""
    sequences = [make_sequence(400, mark=0), *(make_sequence(100, mark=mark) for mark in range(1, 8))]
    by_cost, by_tokens = (
        [plan_microbatches(sequences, rank, 2, 10_000, tokens)[0].num_tokens for rank in range(2)]
        for tokens in (400, math.inf)
    )
    assert sorted(by_cost) == [400, 700]
    assert sorted(by_tokens) == [500, 600]


def test_little_padding() -> None:
    rng = np.random.default_rng(0)
    sequences = [make_sequence(int(size)) for size in rng.integers(10, 100, 256)]
    microbatches = plan_microbatches(sequences, 0, 1, 4096)
    positions = sum(microbatch.input_ids.numel() for microbatch in microbatches)
    assert positions <= 1.05 * sum(sequence.num_inputs for sequence in sequences)


def test_nothing_to_train_still_gives_a_step() -> None:
    (microbatch,) = plan_microbatches([], rank=0, world_size=1, max_tokens=100)
    assert isinstance(microbatch, MicroBatch)
    assert microbatch.needs_gradient
    assert (microbatch.num_tokens, len(microbatch.targets)) == (0, 0)
