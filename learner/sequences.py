"""What the learner trains on: each completion of a batch as a sequence, with all that its tokens' losses need."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from databus.codec import Array
from databus.groups import Group
from learner.aggregation import token_weights
from learner.config import LossConfig


@dataclass(frozen=True)
class Sequence:
    """Prompt and completion of one sample. Arrays over its loss-bearing tokens, K of them, which may be 0:

    token_ids: int64 [n]. targets: int64 [K], indices into token_ids, from 1 on. logprobs: float32 [K], of the
    sampling policy. lag: versions between training and the oldest token of the completion. start: of its loss-bearing
    tokens among those of the batch, end to end. advantages: float32 [K].
    weight: of each token's loss in the batch's. regularised: has a gradient whatever its advantages.
    recomputed, reference: float32 [K], log-probabilities as in `LossTokens`; None where not asked for.
    """

    token_ids: Array
    targets: Array
    logprobs: Array
    lag: int
    start: int
    advantages: Array
    weight: float = 1.0
    regularised: bool = False
    recomputed: Array | None = None
    reference: Array | None = None

    @property
    def num_inputs(self) -> int:
        """The last token is a target only."""
        return len(self.token_ids) - 1

    @property
    def needs_gradient(self) -> bool:
        return self.regularised or bool(self.advantages.any())


def sequences_of(groups: Items[Group], step: int, mask_truncated: bool = False) -> list[Sequence]:
    """One for every completion, in order, without advantages yet.

    Args: step: the version being trained. mask_truncated: no token of a truncated completion bears loss.
    """
    sequences: list[Sequence] = []
    start = 0
    for group in groups:
        versions = group.token_versions().astype(np.int64)
        for index, part in enumerate(_slices(group)):
            masked = mask_truncated and bool(group.truncated[index])
            kept = np.flatnonzero(group.loss_mask[part]) if not masked else np.zeros(0, np.int64)
            sequences.append(
                Sequence(
                    token_ids=np.concatenate((group.prompt_ids, group.token_ids[part])).astype(np.int64),
                    targets=kept + len(group.prompt_ids),
                    logprobs=group.logprobs[part][kept],
                    lag=step - int(versions[part].min(initial=step)),
                    start=start,
                    advantages=np.zeros(len(kept), np.float32),
                )
            )
            start += len(kept)
    return sequences


def with_advantages(sequences: Items[Sequence], groups: Items[Group], advantages: Items[Array]) -> list[Sequence]:
    """Args: sequences: as `sequences_of` made them of the groups. advantages: of each group, [G] or [T]."""
    each = [values for group, given in zip(groups, advantages, strict=True) for values in _by_completion(group, given)]
    return [
        replace(sequence, advantages=values[sequence.targets - (len(sequence.token_ids) - len(values))])
        for sequence, values in zip(sequences, each, strict=True)
    ]


def weighted(sequences: Items[Sequence], config: LossConfig) -> list[Sequence]:
    """Those of a minibatch that bear loss, weighted so that its loss is the sum over their tokens."""
    weights = token_weights([len(sequence.targets) for sequence in sequences], config)
    return [
        replace(sequence, weight=weight, regularised=config.regularised)
        for sequence, weight in zip(sequences, weights, strict=True)
        if len(sequence.targets)
    ]


def _by_completion(group: Group, advantages: Array) -> list[Array]:
    """[length] for each completion, from [G] or [T]."""
    if advantages.shape == (group.num_tokens,) and group.num_tokens != group.size:
        return [advantages[part] for part in _slices(group)]
    return [np.full(length, value, np.float32) for value, length in zip(advantages, group.lengths, strict=True)]


def _slices(group: Group) -> list[slice]:
    ends = np.cumsum(group.lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, group.lengths.tolist(), strict=True)]
