"""Groups to packed micro-batches: no sequence is cut, hardly a position is padding, ranks carry equal loads.

A micro-batch has rows of equal width, each holding several sequences end to end. Rows as wide as the longest
sequence, not one long row, because attention costs the square of a row's width.
"""

from bisect import bisect_right
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from databus.codec import Array
from databus.groups import Group
from learner.advantages import group_advantages


@dataclass(frozen=True)
class Sequence:
    """Prompt and completion of one sample. Arrays over its loss-bearing tokens, K of them:

    token_ids: int64 [n]. targets: int64 [K], indices into token_ids, from 1 on. logprobs: float32 [K], of the
    sampling policy. oldest_version: of the policy versions that sampled the completion. advantage: one for all of it.
    """

    token_ids: Array
    targets: Array
    logprobs: Array
    oldest_version: int
    advantage: float

    @property
    def num_inputs(self) -> int:
        """The last token is a target only."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: R rows of width L with K loss-bearing positions.

    input_ids, position_ids: int64 [R, L]; positions restart at each sequence; padding goes on with the positions of
    the sequence before it, which it cannot influence. loss_positions: int64 [K], indices into the flattened rows.
    targets: int64 [K]. sampled, advantages: float32 [K]. oldest_versions: int64 [K], of the
    token's completion. num_tokens: without padding.
    needs_gradient: False where every advantage is 0, so that a forward pass is enough.
    """

    input_ids: Tensor
    position_ids: Tensor
    loss_positions: Tensor
    targets: Tensor
    sampled: Tensor
    advantages: Tensor
    oldest_versions: Tensor
    num_tokens: int
    needs_gradient: bool

    def to(self, device: torch.device) -> "MicroBatch":
        return replace(self, **{name: v.to(device) for name, v in self.__dict__.items() if isinstance(v, Tensor)})


def sequences_of(groups: Items[Group], scale_rewards: bool) -> list[Sequence]:
    """The samples of groups that bear loss, in order. Raises: ValueError if a group has fewer than 2 completions."""
    sequences: list[Sequence] = []
    for group in groups:
        advantages = group_advantages(torch.tensor(group.rewards)[None], scale_rewards)[0].tolist()
        versions = group.token_versions().astype(np.int64)
        ends = np.cumsum(group.lengths)
        for advantage, start, end in zip(advantages, ends - group.lengths, ends, strict=True):
            part = slice(int(start), int(end))
            kept = np.flatnonzero(group.loss_mask[part])
            if len(kept):
                sequences.append(_sequence(group, part, kept, versions, advantage))
    return sequences


def _sequence(group: Group, part: slice, kept: Array, versions: Array, advantage: float) -> Sequence:
    return Sequence(
        token_ids=np.concatenate((group.prompt_ids, group.token_ids[part])).astype(np.int64),
        targets=kept + len(group.prompt_ids),
        logprobs=group.logprobs[part][kept],
        oldest_version=int(versions[part].min()),
        advantage=advantage,
    )


def plan_microbatches(sequences: Items[Sequence], rank: int, world_size: int, max_tokens: int) -> list[MicroBatch]:
    """This rank's micro-batches; every rank has the same number of each kind, in the same order.

    FSDP's collectives must match, so a rank that runs out gets an empty micro-batch. Sequences with advantage 0 go
    into micro-batches of their own, which need no backward pass. At least one micro-batch needs a gradient, so
    that every step has one. Deterministic: a function of its arguments alone.

    Args: max_tokens: positions (R · L) of one micro-batch; a longer single sequence gets one of its own.
    """
    microbatches: list[MicroBatch] = []
    for needs_gradient in (True, False):
        pool = [sequence for sequence in sequences if (sequence.advantage != 0) == needs_gradient]
        shares = [pack_rows(share, max_tokens) for share in balance(pool, world_size)]
        count = max(max(map(len, shares)), int(needs_gradient))
        mine = shares[rank] + [[]] * (count - len(shares[rank]))
        microbatches += [build_microbatch(rows, needs_gradient) for rows in mine]
    return microbatches


def balance(sequences: Items[Sequence], shares: int) -> list[list[Sequence]]:
    """Split into shares of about equal token counts: longest first, each to the lightest share."""
    result: list[list[Sequence]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for sequence in sorted(sequences, key=lambda item: -item.num_inputs):  # stable: ties keep their order
        lightest = loads.index(min(loads))
        result[lightest].append(sequence)
        loads[lightest] += sequence.num_inputs
    return result


def pack_rows(sequences: Items[Sequence], max_tokens: int) -> list[list[list[Sequence]]]:
    """Micro-batches of rows of sequences, by first fit, longest first.

    Rows are as wide as the longest sequence, until all that is left fits twice into a row: wider rows pack better,
    narrower ones cost less attention.
    """
    waiting = sorted(sequences, key=_num_inputs)
    width = 0
    microbatches: list[list[list[Sequence]]] = []
    while waiting:
        longest = waiting[-1].num_inputs
        if not longest <= width < 2 * longest:
            width = longest
        rows: list[list[Sequence]] = []
        while waiting and len(rows) < max(1, max_tokens // width):
            rows.append(_take_row(waiting, width))
        microbatches.append(rows)
    return microbatches


def _take_row(waiting: list[Sequence], width: int) -> list[Sequence]:
    """Remove one row from sequences sorted by length: the longest, then again and again the longest that fits."""
    row: list[Sequence] = []
    while (fitting := bisect_right(waiting, width, key=_num_inputs)) > 0:
        row.append(waiting.pop(fitting - 1))
        width -= row[-1].num_inputs
    return row


def _num_inputs(sequence: Sequence) -> int:
    return sequence.num_inputs


def build_microbatch(rows: Items[Items[Sequence]], needs_gradient: bool) -> MicroBatch:
    """Tensors of packed rows; no rows give an empty micro-batch of one padding position."""
    width = max((sum(sequence.num_inputs for sequence in row) for row in rows), default=1)
    input_ids = np.zeros((max(1, len(rows)), width), np.int64)
    position_ids = np.tile(np.arange(width), (max(1, len(rows)), 1))
    packed: list[Sequence] = []
    loss_positions: list[Array] = []
    for row, sequences in enumerate(rows):
        column = 0
        for sequence in sequences:
            end = column + sequence.num_inputs
            input_ids[row, column:end] = sequence.token_ids[:-1]
            position_ids[row, column:] = np.arange(width - column)
            loss_positions.append(row * width + column + sequence.targets - 1)
            packed.append(sequence)
            column = end
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        loss_positions=_join(loss_positions, np.int64),
        targets=_join([s.token_ids[s.targets] for s in packed], np.int64),
        sampled=_join([s.logprobs for s in packed], np.float32),
        advantages=_join([np.full(len(s.targets), s.advantage) for s in packed], np.float32),
        oldest_versions=_join([np.full(len(s.targets), s.oldest_version) for s in packed], np.int64),
        num_tokens=sum(s.num_inputs for s in packed),
        needs_gradient=needs_gradient,
    )


def _join(arrays: list[Array], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype))
