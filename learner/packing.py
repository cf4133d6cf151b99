"""Groups to packed micro-batches: no sequence is cut, hardly a position is padding, ranks carry equal loads.

A micro-batch has rows of equal width, each holding several sequences end to end. Rows as wide as the longest
sequence, not one long row, because attention costs the square of a row's width.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from databus.codec import Array
from learner.balance import balance, sequence_cost
from learner.losses import LossTokens
from learner.sequences import Sequence


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: R rows of width L with K loss-bearing positions.

    input_ids, position_ids: int64 [R, L]; positions restart at each sequence; padding goes on with the positions of
    the sequence before it, which it cannot influence. loss_positions: int64 [K], indices into the flattened rows.
    targets: int64 [K]. places: int64 [K], indices into the loss-bearing tokens of all sequences that were planned, end
    to end. num_tokens: without padding. needs_gradient: False where a forward pass is enough.
    """

    input_ids: Tensor
    position_ids: Tensor
    loss_positions: Tensor
    targets: Tensor
    places: Tensor
    tokens: LossTokens
    num_tokens: int
    needs_gradient: bool

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: v.to(device) for name, v in self.__dict__.items() if isinstance(v, Tensor | LossTokens)}
        return replace(self, **moved)


def plan_microbatches(
    sequences: Items[Sequence], rank: int, world_size: int, max_tokens: int, attention_tokens: float = math.inf
) -> list[MicroBatch]:
    """This rank's micro-batches; every rank has the same number of each kind, in the same order.

    FSDP's collectives must match, so a rank that runs out gets an empty micro-batch. Sequences without a gradient go
    into micro-batches of their own, which need no backward pass. At least one micro-batch needs a gradient, so
    that every step has one. Deterministic: a function of its arguments alone.

    Args: sequences: all with `recomputed` and `reference`, or all without.
        max_tokens: positions (R · L) of one micro-batch; a longer single sequence gets one of its own.
        attention_tokens: as `sequence_cost`, by which ranks are given equal loads.
    """
    microbatches: list[MicroBatch] = []
    for needs_gradient in (True, False):
        pool = [sequence for sequence in sequences if sequence.needs_gradient == needs_gradient]
        split = balance([sequence_cost(sequence, attention_tokens) for sequence in pool], world_size)
        shares = [pack_rows([pool[index] for index in share], max_tokens) for share in split]
        count = max(max(map(len, shares)), int(needs_gradient))
        mine = shares[rank] + [[]] * (count - len(shares[rank]))
        microbatches += [build_microbatch(rows, needs_gradient) for rows in mine]
    return microbatches


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
    counts = [len(sequence.targets) for sequence in packed]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        loss_positions=_join(loss_positions, np.int64),
        targets=_join([s.token_ids[s.targets] for s in packed], np.int64),
        places=_join([s.start + np.arange(len(s.targets)) for s in packed], np.int64),
        tokens=LossTokens(
            sampled=_join([s.logprobs for s in packed], np.float32),
            advantages=_join([s.advantages for s in packed], np.float32),
            weights=_spread([s.weight for s in packed], counts, np.float32),
            owners=_spread(range(len(packed)), counts, np.int64),
            lags=_spread([s.lag for s in packed], counts, np.int64),
            num_sequences=len(packed),
            recomputed=_join_optional([s.recomputed for s in packed]),
            reference=_join_optional([s.reference for s in packed]),
        ),
        num_tokens=sum(s.num_inputs for s in packed),
        needs_gradient=needs_gradient,
    )


def _join(arrays: Items[Array], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype))


def _join_optional(arrays: Items[Array | None]) -> Tensor | None:
    present = [array for array in arrays if array is not None]
    return _join(present, np.float32) if present else None


def _spread(values: Items[float], counts: Items[int], dtype: type) -> Tensor:
    """[K]: the value of its sequence for each token."""
    return torch.from_numpy(np.repeat(np.array(values, dtype), counts))
