from dataclasses import replace

import msgspec
import numpy as np

from databus.groups import Group
from learner.config import LossConfig
from learner.sequences import sequences_of, weighted, with_advantages

GROUP = Group(
    prompt_ids=np.array([5, 6], np.int32),
    lengths=np.array([3, 0, 2, 1], np.int32),
    token_ids=np.array([7, 8, 9, 10, 11, 12], np.int32),
    logprobs=np.array([-1, -2, -3, -4, -5, -6], np.float32),
    loss_mask=np.array([1, 0, 1, 0, 0, 1], np.uint8),
    version_values=np.array([3, 4], np.int32),
    version_lengths=np.array([2, 4], np.int32),
    rewards=np.array([1, 0, 0.5, 0], np.float32),
    reward_parts=np.zeros((4, 0), np.float32),
    truncated=np.array([0, 0, 0, 1], np.uint8),
)


def test_by_hand() -> None:
    """The second completion is empty, the third bears no loss; they are there all the same, and count where B does."""
    sequences = sequences_of([GROUP], step=5)
    assert [sequence.token_ids.tolist() for sequence in sequences] == [
        [5, 6, 7, 8, 9],
        [5, 6],
        [5, 6, 10, 11],
        [5, 6, 12],
    ]
    assert [sequence.targets.tolist() for sequence in sequences] == [[2, 4], [], [], [2]]
    assert [sequence.logprobs.tolist() for sequence in sequences] == [[-1, -3], [], [], [-6]]
    assert [sequence.lag for sequence in sequences] == [2, 0, 1, 1]
    assert [sequence.start for sequence in sequences] == [0, 2, 2, 2]


def test_truncated_completions_bear_no_loss_if_told_so() -> None:
    assert [len(sequence.targets) for sequence in sequences_of([GROUP], 5, mask_truncated=True)] == [2, 0, 0, 0]


def test_advantages_of_completions_and_of_tokens() -> None:
    sequences = sequences_of([GROUP, GROUP], step=5)
    completions, tokens = np.array([1, 2, 3, 4], np.float32), np.arange(10, 16, dtype=np.float32)
    given = with_advantages(sequences, [GROUP, GROUP], [completions, tokens])
    assert [sequence.advantages.tolist() for sequence in given] == [[1, 1], [], [], [4], [10, 12], [], [], [15]]


def test_as_many_tokens_as_completions() -> None:
    """One token each: both readings of the shape are the same."""
    group = replace(
        GROUP,
        lengths=np.ones(6, np.int32),
        rewards=np.zeros(6, np.float32),
        truncated=np.zeros(6, np.uint8),
    )
    given = with_advantages(sequences_of([group], 5), [group], [np.arange(6, dtype=np.float32)])
    assert [sequence.advantages.tolist() for sequence in given] == [[0], [], [2], [], [], [5]]


def test_weights_count_completions_without_loss() -> None:
    config = LossConfig(aggregation="sequence")
    kept = weighted(sequences_of([GROUP], step=5), config)
    assert [sequence.weight for sequence in kept] == [1 / 8, 1 / 4]
    assert not any(sequence.needs_gradient for sequence in kept)
    regularised = weighted(sequences_of([GROUP], step=5), msgspec.structs.replace(config, entropy_coef=0.1))
    assert all(sequence.needs_gradient for sequence in regularised)
