"""The compiled part of the delta codec: what differs between two stretches of words, and how to put it back.

Words are uint16 or uint32, in blocks of at most 65,536, so that every gap within a block fits in 16 bits. A table has a
row a block, int64: its first word, its length, and how many of its values follow; as many as it is long where all do.
"""

from typing import Any

import numba
import numpy as np

GROUP_EIGHTS = 8
"""Compared at one time: 64 bytes, which at usual learning rates are equal in half of all cases."""
FIRST, LENGTH, COUNT = 0, 1, 2

# Without `_nrt` a function counts no references to the arrays that it is given, and can make none.
compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, _nrt=False)
"""Decorator: machine code, without the interpreter's lock, kept on disk between processes."""


@compiled
def take_changes(old, new, begin, end, old_eights, new_eights, positions, values, filled):
    """Where new[begin:end] differs from `old`, which becomes equal to it there.

    Args: old, new: words of one type. old_eights, new_eights: uint64, the same memory, as far as it goes; `begin` is at
        one of them. positions: uint32, values: as new; both with room for end - begin after `filled`. A position counts
        from `begin`.
    Returns: `filled` and what was found.
    """
    bits = 8 * new.itemsize
    lanes = 8 // new.itemsize
    lane_mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    group = begin // lanes
    last = min(end // lanes, new_eights.shape[0]) // GROUP_EIGHTS * GROUP_EIGHTS
    while group < last:
        differs = np.uint64(0)
        for at in range(group, group + GROUP_EIGHTS):
            differs |= old_eights[at] ^ new_eights[at]
        if differs != 0:
            for at in range(group, group + GROUP_EIGHTS):
                eight = new_eights[at]
                differs = old_eights[at] ^ eight
                if differs == 0:
                    continue
                old_eights[at] = eight
                for lane in range(lanes):  # no branch: which of them differ is as good as random
                    shift = np.uint64(lane * bits)
                    positions[filled] = at * lanes + lane - begin
                    values[filled] = eight >> shift
                    filled += np.int64((differs >> shift) & lane_mask != 0)
        group += GROUP_EIGHTS
    for at in range(max(begin, group * lanes), end):
        if old[at] != new[at]:
            positions[filled] = at - begin
            values[filled] = new[at]
            filled += 1
            old[at] = new[at]
    return filled


@compiled
def diff_blocks(old, new, old_eights, new_eights, first, block_words, table, num_blocks, positions, values, filled):
    """Append the blocks of `new` in which it differs from `old`, which becomes equal to it.

    Args: old, new: words [n]. old_eights, new_eights: as `take_changes`. first: place of their first word in the
        version. table: int64 [≥ num_blocks + ⌈n / block⌉, 3]. positions, values: as `take_changes`.
    Returns: (num_blocks, filled) after them. Where a block's positions would take more than its words, all its words
        are values, and its positions mean nothing.
    """
    for begin in range(0, new.shape[0], block_words):
        end = min(begin + block_words, new.shape[0])
        after = take_changes(old, new, begin, end, old_eights, new_eights, positions, values, filled)
        count = after - filled
        if count == 0:
            continue
        if count * (2 + new.itemsize) >= (end - begin) * new.itemsize:
            count = end - begin
            for offset in range(count):
                values[filled + offset] = new[begin + offset]
        table[num_blocks, FIRST] = first + begin
        table[num_blocks, LENGTH] = end - begin
        table[num_blocks, COUNT] = count
        num_blocks += 1
        filled += count
    return num_blocks, filled


@compiled
def pack_blocks(table, num_blocks, positions, values, num_gaps, num_values, planes):
    """Bytes of one kind lie together, which compresses better: gaps' low and high bytes, then values', low byte first.

    Args: planes: uint8 [2 · num_gaps + itemsize · num_values].
    """
    gap_at, value_at = 0, 0
    values_begin = 2 * num_gaps
    for block in range(num_blocks):
        count = table[block, COUNT]
        if count < table[block, LENGTH]:
            expected = np.int64(0)
            for index in range(value_at, value_at + count):
                gap = np.int64(positions[index]) - expected
                planes[gap_at] = gap & 255
                planes[num_gaps + gap_at] = gap >> 8
                gap_at += 1
                expected = np.int64(positions[index]) + 1
        value_at += count
    for plane in range(values.itemsize):
        to = values_begin + plane * num_values
        for index in range(num_values):
            planes[to + index] = (np.int64(values[index]) >> (8 * plane)) & 255


@compiled
def first_beyond(table, planes, num_gaps):
    """The first block with a position beyond its length; -1 where there is none. `table` agrees with `num_gaps`."""
    gap_at = 0
    for block in range(table.shape[0]):
        count = table[block, COUNT]
        if count < table[block, LENGTH]:
            reach = np.int64(count)  # at most 65,536 · 65,536
            for index in range(gap_at, gap_at + count):
                reach += np.int64(planes[index]) + (np.int64(planes[num_gaps + index]) << 8)
            if reach > table[block, LENGTH]:
                return block
            gap_at += count
    return -1


@compiled
def write_blocks(table, planes, num_gaps, num_values, words):
    """Overwrite what differs. Everything was checked before: the table lies within `words`, gaps within blocks."""
    gap_at, low = 0, 2 * num_gaps
    high, third, fourth = low + num_values, low + 2 * num_values, low + 3 * num_values
    for block in range(table.shape[0]):
        count, at = table[block, COUNT], table[block, FIRST] - 1
        is_sparse = count < table[block, LENGTH]
        for index in range(count):
            at += 1
            if is_sparse:
                at += np.int64(planes[gap_at]) + (np.int64(planes[num_gaps + gap_at]) << 8)
                gap_at += 1
            word = np.int64(planes[low + index]) | np.int64(planes[high + index]) << 8
            if words.itemsize == 4:
                word |= np.int64(planes[third + index]) << 16 | np.int64(planes[fourth + index]) << 24
            words[at] = word
        low, high, third, fourth = low + count, high + count, third + count, fourth + count
