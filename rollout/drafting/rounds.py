"""One round of the whole running batch, compiled: take what was sampled, then draft what may come next."""

import numpy as np

from rollout.drafting.automaton import (
    DEPTH,
    LENGTH,
    LINK,
    VERSION,
    WRITER,
    follow,
    likeliest,
    shorten,
    write,
)
from rollout.drafting.calibration import cell_of, chance, forget, learn
from rollout.drafting.compiled import compiled
from rollout.drafting.counters import LAGS, SOURCES
from rollout.drafting.running import SIBLING_BITS

OWN, SIBLING, EPOCH, COMMON = range(4)
ROUNDS, DRAFTED, ACCEPTED = range(3)
BY_SOURCE = 3
BY_LAG = BY_SOURCE + 2 * len(SOURCES)
NUM_COUNTERS = BY_LAG + 2 * len(LAGS)

LEAST_SURVIVAL = 0.03
BARREN_ROUNDS, BARREN_EVERY, BARREN_LENGTH = 16, 4, 3
"""Where nothing was found for so many rounds, only every fourth looks, until the text matches three tokens again: to
look costs as much as all else of a round, since what is looked up has long left the processor's caches."""
TRUSTED = 0.8
"""A first token that is so likely to be accepted is drafted from the problem's own automaton without a second look."""


@compiled
def _lag_class(lag):
    at = len(LAGS) - 1
    while at > 0 and lag < LAGS[at]:
        at -= 1
    return at


@compiled
def _judge(running, slot, new, table, counters):
    """Count what became of the drafts of a slot, now that its `new` tokens are known."""
    drafted = running.num_drafts[slot]
    if drafted == 0 or len(new) == 0:
        return
    running.num_drafts[slot] = 0
    counters[ROUNDS] += 1
    for place in range(min(drafted, len(new))):
        accepted = running.drafts[slot, place] == new[place]
        learn(table, running.cells[slot, place], accepted)
        if not accepted:
            break
        counters[ACCEPTED] += 1
        counters[BY_SOURCE + 2 * running.sources[slot, place] + 1] += 1
        counters[BY_LAG + 2 * running.lags[slot, place] + 1] += 1


@compiled
def take(arena, running, slots, tokens, counts, table, counters, version):
    """Give each running request its newly sampled tokens.

    slots [R]: their rows in `running`. tokens: of all rows, one after another. counts [R]. version: that sampled them.
    Returns: False where the arena had no room, after which it is of no use.
    """
    at = 0
    for row in range(len(slots)):
        slot = slots[row]
        new = tokens[at : at + counts[row]]
        at += counts[row]
        _judge(running, slot, new, table, counters)
        last, bound, length = write(
            arena,
            np.int64(running.last[slot]),
            np.int64(running.bound[slot]),
            np.int64(running.length[slot]),
            new,
            version,
            running.writer[slot],
        )
        if last < 0:
            return False
        running.last[slot] = last
        running.bound[slot] = bound
        running.length[slot] = length
        state, common = np.int64(running.common[slot]), np.int64(running.common_length[slot])
        for token in new:
            state, common = follow(arena, state, common, token)
            if running.text_length[slot] < running.text.shape[1]:
                running.text[slot, running.text_length[slot]] = token
                running.text_length[slot] += 1
        running.common[slot] = state
        running.common_length[slot] = common
        running.room[slot] -= len(new)
    return True


@compiled
def _source(arena, running, slot, target, common):
    if common:
        return COMMON
    writer = arena.states[target, WRITER]
    if writer == running.writer[slot]:
        return OWN
    return SIBLING if writer >> SIBLING_BITS == running.writer[slot] >> SIBLING_BITS else EPOCH


@compiled
def _draft(arena, running, slot, row, state, length, common, most, table, version):
    """Walk the commonest way on from a context, into a row of drafts; returns (their number, tokens expected)."""
    states = arena.states
    length = min(length, DEPTH - 1)
    state = shorten(arena, state, length)
    survival, expected, num = 1.0, 0.0, 0
    while num < most:
        token, target, best, total = likeliest(arena, state)
        while token < 0 and states[state, LINK] >= 0 and states[states[state, LINK], LINK] >= 0:
            state = np.int64(states[state, LINK])  # nothing known goes on from here: look at a shorter context
            length = np.int64(states[state, LENGTH])
            token, target, best, total = likeliest(arena, state)
        if token < 0 or length == 0:
            break
        cell = cell_of(common, length, best, total)
        survival *= chance(table, cell)
        if survival < LEAST_SURVIVAL:
            break
        running.drafts[row, num] = token
        running.cells[row, num] = cell
        running.survival[row, num] = survival
        running.sources[row, num] = _source(arena, running, slot, target, common)
        running.lags[row, num] = _lag_class(version - states[target, VERSION])
        expected += survival
        num += 1
        length = min(length + 1, DEPTH - 1)
        state = shorten(arena, target, length)
    return num, expected


@compiled
def _copy_drafts(running, source, target, num):
    for place in range(num):
        running.drafts[target, place] = running.drafts[source, place]
        running.cells[target, place] = running.cells[source, place]
        running.survival[target, place] = running.survival[source, place]
        running.sources[target, place] = running.sources[source, place]
        running.lags[target, place] = running.lags[source, place]


@compiled
def _has_ended(running, slot):
    last = running.text[slot, running.text_length[slot] - 1]
    for token in running.ends:  # noqa: SIM110 (compiled)
        if token == last:
            return True
    return False


@compiled
def _looks(running, slot):
    """Is it worth while to look for a draft?"""
    barren = running.barren[slot]
    if barren < BARREN_ROUNDS or barren % BARREN_EVERY == 0:
        return True
    return max(running.length[slot], running.common_length[slot]) >= BARREN_LENGTH


@compiled
def draft(arena, running, slots, counts, table, version, max_drafts):
    """Draft for every request that has just got tokens and goes on; `running` then says what.

    A request whose last token is one of `running.ends` has ended, though nobody has told it so yet.
    """
    spare = len(running.drafts) - 1
    for row in range(len(slots)):
        slot = slots[row]
        running.num_drafts[slot] = 0
        most = min(max_drafts, running.room[slot] - 1)
        if counts[row] == 0 or most <= 0 or _has_ended(running, slot):
            continue
        if not _looks(running, slot):
            running.barren[slot] += 1
            continue
        state, length = np.int64(running.bound[slot]), np.int64(running.length[slot])
        num, expected = _draft(arena, running, slot, slot, state, length, 0, most, table, version)
        if num == 0 or running.survival[slot, 0] < TRUSTED:
            state, length = np.int64(running.common[slot]), np.int64(running.common_length[slot])
            shared, better = _draft(arena, running, slot, spare, state, length, 1, most, table, version)
            if better > expected:
                num = shared
                _copy_drafts(running, spare, slot, num)
        running.num_drafts[slot] = num
        running.barren[slot] = 0 if num > 0 else running.barren[slot] + 1


@compiled
def play(arena, running, slots, tokens, counts, table, counters, version, max_drafts):
    """`take`, then `draft` unless `max_drafts` is 0: in one call, as handing over the arrays costs as much as ten rows.

    Returns: as `take`.
    """
    if not take(arena, running, slots, tokens, counts, table, counters, version):
        return False
    if max_drafts > 0:
        draft(arena, running, slots, counts, table, version, max_drafts)
        forget(table)
    return True


@compiled
def collect(running, slots, counters, drafts, num_drafts):
    """Copy the drafts out, and count them."""
    for row in range(len(slots)):
        slot = slots[row]
        num = running.num_drafts[slot]
        num_drafts[row] = num
        for place in range(num):
            drafts[row, place] = running.drafts[slot, place]
            counters[BY_SOURCE + 2 * running.sources[slot, place]] += 1
            counters[BY_LAG + 2 * running.lags[slot, place]] += 1
        counters[DRAFTED] += num
