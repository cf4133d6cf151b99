"""A scored group as columns: what a worker sends, the broker checks, and the learner trains on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from databus.codec import DTYPES, Array, Column, Frame, MalformedMessage, decode_columns, encode_columns

GROUP_COLUMNS = {
    "prompt_ids": ("<i4", 1),
    "lengths": ("<i4", 1),
    "token_ids": ("<i4", 1),
    "logprobs": ("<f4", 1),
    "loss_mask": ("|u1", 1),
    "version_values": ("<i4", 1),
    "version_lengths": ("<i4", 1),
    "rewards": ("<f4", 1),
    "reward_parts": ("<f4", 2),
    "truncated": ("|u1", 1),
}
"""Column name -> (dtype, dimensions). G completions, their T tokens concatenated, S version spans, P parts:

prompt_ids [P0]; lengths [G] tokens a completion; token_ids [T]; logprobs [T] of the sampling distribution;
loss_mask [T], 1 where a token bears loss; version_values, version_lengths [S]: run-length code of the
policy version that sampled each of the T tokens; rewards [G]; reward_parts [G, P]; truncated [G], 1 where the
completion ended for want of room, not with an end token.
"""

NO_BITS = np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Group:
    """One prompt with its G completions; arrays as `GROUP_COLUMNS`."""

    prompt_ids: Array
    lengths: Array
    token_ids: Array
    logprobs: Array
    loss_mask: Array
    version_values: Array
    version_lengths: Array
    rewards: Array
    reward_parts: Array
    truncated: Array

    @property
    def size(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def token_versions(self) -> Array:
        """int32 [T]: the policy version that sampled each token."""
        return np.repeat(self.version_values, self.version_lengths)

    @cached_property
    def loss_tokens(self) -> tuple[list[int], list[int]]:
        """(versions, tokens): each span of one version with loss-bearing tokens, and how many it has."""
        ends = list(accumulate(self.version_lengths.tolist(), initial=0))
        mask = self.loss_mask.view(np.bool_)  # a sum of it would first make wider integers of its bytes
        tokens = [int(np.count_nonzero(mask[start:end])) for start, end in pairwise(ends)]
        versions = [version for version, num in zip(self.version_values.tolist(), tokens, strict=True) if num]
        return versions, [num for num in tokens if num]

    @cached_property
    def loss_versions(self) -> tuple[int, int] | None:
        """The oldest and the newest version among loss-bearing tokens; None where no token bears loss."""
        versions, _ = self.loss_tokens
        return (min(versions), max(versions)) if versions else None

    def oldest_loss_version(self) -> int | None:
        """The smallest version among loss-bearing tokens; None where no token bears loss."""
        versions = self.loss_versions
        return None if versions is None else versions[0]

    def columns(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in GROUP_COLUMNS}


def encode_group(group: Group) -> tuple[tuple[Column, ...], list[Frame]]:
    """A group for the wire and the journal: its columns, the loss mask as bits, lowest first, none if all are set."""
    mask = group.loss_mask
    bits = NO_BITS if mask.all() else np.packbits(mask, bitorder="little")
    return encode_columns(group.columns() | {"loss_mask": bits})


def decode_group(columns: Sequence[Column], frames: Sequence[Frame]) -> Group:
    """Its arrays are views of the frames, but for the loss mask. Raises: as `decode_columns`, `group_from_columns`."""
    arrays = decode_columns(columns, frames)
    bits, tokens = arrays.get("loss_mask"), arrays.get("token_ids")
    if bits is not None and tokens is not None and bits.dtype == np.uint8 and bits.ndim == 1:
        arrays["loss_mask"] = _unpacked(bits, tokens.size)
    return group_from_columns(arrays)


def _unpacked(bits: Array, count: int) -> Array:
    """uint8 [count] of 0 and 1. Raises: MalformedMessage for another number of bits, or one beyond them that is set."""
    if not len(bits):
        return _ones(count)
    if len(bits) != -(-count // 8) or (count % 8 and bits[-1] >> count % 8):
        raise MalformedMessage(f"column 'loss_mask' is not {count} bits")
    return np.unpackbits(bits, count=count, bitorder="little")


def _ones(count: int) -> Array:
    """uint8 [count] of 1, a view of what all such masks share; not to be written to."""
    global _shared_ones
    if count > len(_shared_ones):
        _shared_ones = np.ones(2 * count, np.uint8)
        _shared_ones.flags.writeable = False
    return _shared_ones[:count]


_shared_ones = np.ones(0, np.uint8)


def run_lengths(values: Array) -> tuple[Array, Array]:
    """Run-length code of int32 [T] as (values [S], lengths [S])."""
    if not len(values):
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    lengths = np.diff(np.concatenate((starts, [len(values)])))
    return values[starts].astype(np.int32), lengths.astype(np.int32)


def group_from_columns(arrays: dict[str, Array]) -> Group:
    """Check decoded columns and make a group of them.

    Raises: MalformedMessage for a missing or unknown column, a wrong dtype or dimension, lengths that do
        not add up, a mask outside 0 and 1, negative token ids or versions, or a number that is not finite.
    """
    if arrays.keys() != GROUP_COLUMNS.keys():
        wrong = sorted(arrays.keys() ^ GROUP_COLUMNS.keys())
        raise MalformedMessage(f"missing or unknown columns: {', '.join(wrong)}")
    for name, (dtype, dimensions) in GROUP_COLUMNS.items():
        array = arrays[name]
        if array.dtype != DTYPES[dtype] or array.ndim != dimensions:
            raise MalformedMessage(
                f"column {name!r}: {array.dtype.str} with {array.ndim} dimensions, expected {dtype} with {dimensions}"
            )
    group = Group(**arrays)
    _check_sizes(group)
    _check_values(group)
    return group


def _check_sizes(group: Group) -> None:
    num_tokens, size = group.num_tokens, group.size
    if size == 0:
        raise MalformedMessage("a group without completions")
    if len(group.prompt_ids) == 0:
        raise MalformedMessage("a group without a prompt")
    for name in ("logprobs", "loss_mask"):
        if len(getattr(group, name)) != num_tokens:
            raise MalformedMessage(f"column {name!r} has {len(getattr(group, name))} entries for {num_tokens} tokens")
    for name in ("rewards", "reward_parts", "truncated"):
        if len(getattr(group, name)) != size:
            raise MalformedMessage(f"column {name!r} has {len(getattr(group, name))} entries for {size} completions")
    for name in ("lengths", "version_lengths"):
        counts = getattr(group, name).tolist()
        if min(counts, default=0) < 0 or sum(counts) != num_tokens:
            raise MalformedMessage(f"column {name!r} does not add up to {num_tokens} tokens")
    if len(group.version_values) != len(group.version_lengths):
        raise MalformedMessage("version_values and version_lengths differ in length")


def _check_values(group: Group) -> None:
    for name in ("prompt_ids", "token_ids", "version_values"):
        array = getattr(group, name)
        if array.size and np.minimum.reduce(array) < 0:
            raise MalformedMessage(f"column {name!r} has a negative entry")
    for name in ("loss_mask", "truncated"):
        array = getattr(group, name)
        if array.size and np.maximum.reduce(array) > 1:
            raise MalformedMessage(f"column {name!r} has an entry other than 0 and 1")
    for name in ("rewards", "reward_parts"):
        if not math.isfinite(sum(getattr(group, name).ravel().tolist())):  # in 64 bits, which 32 cannot overflow
            raise MalformedMessage(f"column {name!r} has an entry that is not finite")
    if group.num_tokens:  # NaN spreads to both
        lowest, highest = np.minimum.reduce(group.logprobs), np.maximum.reduce(group.logprobs)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise MalformedMessage("column 'logprobs' has an entry that is not finite")
        if highest > 0:
            raise MalformedMessage("column 'logprobs' has an entry above 0")
