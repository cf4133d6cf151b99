"""Suffix automata of many problems in flat int32 arrays, with live counts of every context up to `DEPTH` tokens.

One arena holds all automata; each has a root of its own. A state stands for the contexts (substrings) that end at
the same places of the problem's texts. Texts grow in any order, one token at a time, each with its own `Cursor`.

Counts. COUNT of a state is the number of places where its contexts end, over the texts that are counted in, exact
for contexts of up to DEPTH tokens. A text is counted in as it grows and counted out as a whole when it falls out of
the window; states that nothing counts any more stay until the problem is built anew.

Source: the online suffix automaton of Blumer et al. (1985), for a set of texts that grow together; suffix links
bound the work of one token by a constant, amortised, and DEPTH bounds that of counting.
"""

from typing import NamedTuple

import numpy as np

from databus.codec import Array
from rollout.drafting.compiled import compiled

DEPTH = 64
SCAN = 8
"""Edges of one state that are searched in a row; those beyond lie in the hash table as well."""
MAX_CHILDREN = 32
"""Edges of one state that are looked at when the likeliest continuation is sought."""

# columns of a state; TOKEN, TARGET: its first edge (TOKEN -1: none), MORE: the next edge's row (-1: none)
LENGTH, LINK, COUNT, VERSION, WRITER, TOKEN, TARGET, MORE = range(8)
# columns of an edge beyond a state's first
EDGE_TOKEN, EDGE_TARGET, EDGE_NEXT = range(3)
# columns of a slot of the hash table
SLOT_STATE, SLOT_EDGE = range(2)
EMPTY, DELETED = -1, -2
# registers
STATES_USED, STATE_FREE, EDGES_USED, EDGE_FREE, TABLE_USED, NUM_STATES, NUM_EDGES, FULL = range(8)


class Arena(NamedTuple):
    """states: int32 [S, 8]. edges: int32 [E, 3]. table: int32 [H, 2], H a power of two. registers: int64 [8]."""

    states: Array
    edges: Array
    table: Array
    registers: Array


def new_arena(num_states: int, num_edges: int, table_size: int = 1024) -> Arena:
    """An empty arena with room for so many states and further edges; table_size: a power of two."""
    registers = np.zeros(8, np.int64)
    registers[STATE_FREE] = registers[EDGE_FREE] = -1
    return Arena(
        np.empty((num_states, 8), np.int32),
        np.empty((num_edges, 3), np.int32),
        np.full((table_size, 2), EMPTY, np.int32),
        registers,
    )


def grow(arena: Arena, num_states: int, num_edges: int) -> Arena:
    """The same automata with room for so many states and further edges, and a hash table to match.

    The arrays grow in place, which for large ones moves no memory; nobody may hold a view of them.
    """
    arena.states.resize((max(num_states, len(arena.states)), 8), refcheck=False)
    arena.edges.resize((max(num_edges, len(arena.edges)), 3), refcheck=False)
    live = int((arena.table[:, SLOT_STATE] >= 0).sum())
    size = 1024
    while size < 4 * live:
        size *= 2
    bigger = arena._replace(table=np.full((size, 2), EMPTY, np.int32))
    _rehash(arena.table, bigger)
    return bigger


def has_room(arena: Arena, held: int, growth: int) -> bool:
    """Whether `growth` more tokens fit for certain; held: tokens and texts that the automata were made of so far.

    A token makes at most two states. Of an automaton's edges, those that are not a state's first are at most as many as
    its tokens and its texts. The hash table, which few edges need, is asked to be half empty.
    """
    registers = arena.registers
    return bool(
        len(arena.states) - registers[NUM_STATES] >= 2 * growth
        and len(arena.edges) >= held + growth
        and 2 * registers[TABLE_USED] <= len(arena.table)
    )


# ---------------------------------------------------------------- states and edges


@compiled
def new_state(arena, length, link):
    """A state without edges; -1 where there is no room, which `FULL` then says as well."""
    registers = arena.registers
    state = registers[STATE_FREE]
    if state >= 0:
        registers[STATE_FREE] = arena.states[state, LINK]
    elif registers[STATES_USED] < len(arena.states):
        state = registers[STATES_USED]
        registers[STATES_USED] += 1
    else:
        registers[FULL] = 1
        return -1
    registers[NUM_STATES] += 1
    states = arena.states
    states[state, LENGTH] = length
    states[state, LINK] = link
    states[state, COUNT] = 0
    states[state, VERSION] = -1
    states[state, WRITER] = -1
    states[state, TOKEN] = -1
    states[state, TARGET] = -1
    states[state, MORE] = -1
    return state


@compiled
def _hash(state, token, mask):
    mixed = (np.uint64(state) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(token) * np.uint64(0xC2B2AE3D27D4EB4F))
    return np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask))


@compiled
def _table_add(arena, state, edge):
    table = arena.table
    mask = len(table) - 1
    if arena.registers[TABLE_USED] >= mask:
        arena.registers[FULL] = 1
        return
    at = _hash(state, arena.edges[edge, EDGE_TOKEN], mask)
    while table[at, SLOT_STATE] >= 0:
        at = (at + 1) & mask
    if table[at, SLOT_STATE] == EMPTY:
        arena.registers[TABLE_USED] += 1
    table[at, SLOT_STATE] = state
    table[at, SLOT_EDGE] = edge


@compiled
def _table_find(arena, state, token):
    """The slot of an edge; -1 where it is not in the table."""
    table = arena.table
    mask = len(table) - 1
    at = _hash(state, token, mask)
    while table[at, SLOT_STATE] != EMPTY:
        if table[at, SLOT_STATE] == state and arena.edges[table[at, SLOT_EDGE], EDGE_TOKEN] == token:
            return at
        at = (at + 1) & mask
    return -1


@compiled
def _rehash(old, arena):
    arena.registers[TABLE_USED] = 0
    for at in range(len(old)):
        if old[at, SLOT_STATE] >= 0:
            _table_add(arena, old[at, SLOT_STATE], old[at, SLOT_EDGE])


@compiled
def find_edge(arena, state, token):
    """The row of a further edge of `state` by `token`; -1 where there is none."""
    edges = arena.edges
    edge = arena.states[state, MORE]
    scanned = 0
    while edge >= 0:
        if edges[edge, EDGE_TOKEN] == token:
            return np.int64(edge)
        scanned += 1
        if scanned == SCAN:
            slot = _table_find(arena, state, token)
            return np.int64(arena.table[slot, SLOT_EDGE]) if slot >= 0 else np.int64(-1)
        edge = edges[edge, EDGE_NEXT]
    return np.int64(-1)


@compiled
def goto(arena, state, token):
    """The state that `token` leads to; -1 where there is none."""
    states = arena.states
    if states[state, TOKEN] == token:
        return np.int64(states[state, TARGET])
    if states[state, MORE] < 0:
        return np.int64(-1)
    edge = find_edge(arena, state, token)
    return np.int64(arena.edges[edge, EDGE_TARGET]) if edge >= 0 else np.int64(-1)


@compiled
def _redirect(arena, state, token, old, new):
    """Lead the edge by `token` to `new` if it leads to `old`; returns whether it did."""
    states = arena.states
    if states[state, TOKEN] == token:
        if states[state, TARGET] != old:
            return False
        states[state, TARGET] = new
        return True
    edge = find_edge(arena, state, token)
    if edge < 0 or arena.edges[edge, EDGE_TARGET] != old:
        return False
    arena.edges[edge, EDGE_TARGET] = new
    return True


@compiled
def _add_edge(arena, state, token, target):
    """An edge that does not exist yet. The first SCAN further edges of a state keep their places."""
    states, registers, edges = arena.states, arena.registers, arena.edges
    if states[state, TOKEN] < 0:
        states[state, TOKEN] = token
        states[state, TARGET] = target
        return
    edge = registers[EDGE_FREE]
    if edge >= 0:
        registers[EDGE_FREE] = edges[edge, EDGE_NEXT]
    elif registers[EDGES_USED] < len(edges):
        edge = registers[EDGES_USED]
        registers[EDGES_USED] += 1
    else:
        registers[FULL] = 1
        return
    registers[NUM_EDGES] += 1
    edges[edge, EDGE_TOKEN] = token
    edges[edge, EDGE_TARGET] = target
    last, scanned = np.int64(-1), 0
    following = np.int64(states[state, MORE])
    while following >= 0 and scanned < SCAN:
        last = following
        following = np.int64(edges[following, EDGE_NEXT])
        scanned += 1
    edges[edge, EDGE_NEXT] = following
    if last < 0:
        states[state, MORE] = edge
    else:
        edges[last, EDGE_NEXT] = edge
    if scanned == SCAN:
        _table_add(arena, state, edge)


# ---------------------------------------------------------------- texts


@compiled
def _split(arena, state, source, token):
    """Part the contexts of `state` that are no longer than those of `source` and one token off, into a new state."""
    states = arena.states
    clone = new_state(arena, states[source, LENGTH] + 1, states[state, LINK])
    if clone < 0:
        return clone
    for column in (COUNT, VERSION, WRITER, TOKEN, TARGET):
        states[clone, column] = states[state, column]
    edge = states[state, MORE]
    while edge >= 0:
        _add_edge(arena, clone, arena.edges[edge, EDGE_TOKEN], arena.edges[edge, EDGE_TARGET])
        edge = arena.edges[edge, EDGE_NEXT]
    states[state, LINK] = clone
    while source >= 0 and _redirect(arena, source, token, state, clone):
        source = np.int64(states[source, LINK])
    return clone


@compiled
def extend(arena, last, token):
    """Let a text grow by a token. last: the state of the text so far. Returns: that of the longer text; -1: no room."""
    states = arena.states
    state = goto(arena, last, token)
    if state >= 0:  # another text has gone on like this before
        if states[state, LENGTH] == states[last, LENGTH] + 1:
            return state
        return np.int64(_split(arena, state, last, token))
    new = np.int64(new_state(arena, states[last, LENGTH] + 1, 0))
    if new < 0:
        return new
    source, root = np.int64(last), np.int64(last)
    while source >= 0 and state < 0:
        _add_edge(arena, source, token, new)
        root = source
        source = np.int64(states[source, LINK])
        if source >= 0:
            state = goto(arena, source, token)
    if source < 0:
        states[new, LINK] = root
    elif states[state, LENGTH] == states[source, LENGTH] + 1:
        states[new, LINK] = state
    else:
        clone = _split(arena, state, source, token)
        if clone < 0:
            return np.int64(-1)
        states[new, LINK] = clone
    return new


@compiled
def shorten(arena, state, length):
    """The state of the last `length` tokens of a context of `state`."""
    states = arena.states
    link = states[state, LINK]
    while link >= 0 and states[link, LENGTH] >= length:
        state = np.int64(link)
        link = states[link, LINK]
    return state


@compiled
def count_place(arena, state, change, version, writer):
    """Count a place in or out, for every context that ends there; state: that of its last DEPTH tokens."""
    states = arena.states
    link = states[state, LINK]
    while link >= 0:  # not the root: the empty context ends everywhere
        states[state, COUNT] += change
        if change > 0:
            states[state, VERSION] = version
            states[state, WRITER] = writer
        state = np.int64(link)
        link = states[state, LINK]


@compiled
def follow(arena, state, length, token):
    """Go on with a match by a token that the automaton may not know.

    state, length: of the longest context that ends here, at most DEPTH tokens. Returns: the same, one token later.
    """
    states = arena.states
    state = shorten(arena, state, length)
    target = goto(arena, state, token)
    while target < 0 and states[state, LINK] >= 0:
        state = np.int64(states[state, LINK])
        length = np.int64(states[state, LENGTH])
        target = goto(arena, state, token)
    if target < 0:
        return state, np.int64(0)
    length = min(length + 1, DEPTH)
    return shorten(arena, target, length), length


@compiled
def write(arena, last, bound, length, tokens, version, writer):
    """Let a text grow by many tokens and count them in.

    last: the text's state. bound, length: state and number of its last DEPTH tokens.
    Returns: the same three afterwards; last is -1 where there was no room, and the automaton is then of no use.
    """
    for token in tokens:
        last = extend(arena, last, token)
        if last < 0:
            return last, bound, length
        bound = goto(arena, shorten(arena, bound, length), token)
        length = min(length + 1, DEPTH)
        bound = shorten(arena, bound, length)
        count_place(arena, bound, 1, version, writer)
    return last, bound, length


@compiled
def count_out(arena, bound, length, tokens):
    """Take a text's places out of the counts. bound, length: where the text begins, as `write` was given them."""
    for token in tokens:
        bound = goto(arena, shorten(arena, bound, length), token)
        length = min(length + 1, DEPTH)
        bound = shorten(arena, bound, length)
        count_place(arena, bound, -1, 0, 0)


@compiled
def likeliest(arena, state):
    """(token, target, its count, count of all) of the commonest continuation; token -1 where none is counted."""
    states, edges = arena.states, arena.edges
    token, target, best, total = np.int64(-1), np.int64(-1), np.int64(0), np.int64(0)
    if states[state, TOKEN] < 0:
        return token, target, best, total
    count = np.int64(states[states[state, TARGET], COUNT])
    if count > 0:
        token, target, best, total = np.int64(states[state, TOKEN]), np.int64(states[state, TARGET]), count, count
    edge = states[state, MORE]
    seen = 1
    while edge >= 0 and seen < MAX_CHILDREN:
        count = np.int64(states[edges[edge, EDGE_TARGET], COUNT])
        total += count
        if count > best:
            token, target, best = np.int64(edges[edge, EDGE_TOKEN]), np.int64(edges[edge, EDGE_TARGET]), count
        edge = edges[edge, EDGE_NEXT]
        seen += 1
    return token, target, best, total


@compiled
def free_automaton(arena, root):
    """Give every state and edge of an automaton back, its root too. Those that wait for it are linked by COUNT."""
    states = arena.states
    states[root, LENGTH] = -1
    states[root, COUNT] = -1
    waiting = np.int64(root)
    while waiting >= 0:
        state = waiting
        waiting = np.int64(states[state, COUNT])
        if states[state, TOKEN] >= 0:
            waiting = _mark(arena, np.int64(states[state, TARGET]), waiting)
        waiting = _free_edges(arena, state, waiting)
        states[state, LINK] = arena.registers[STATE_FREE]
        arena.registers[STATE_FREE] = state
        arena.registers[NUM_STATES] -= 1


@compiled
def _mark(arena, state, waiting):
    """Let a state wait to be freed, once. Returns: the first that waits."""
    states = arena.states
    if states[state, LENGTH] < 0:
        return waiting
    states[state, LENGTH] = -1
    states[state, COUNT] = waiting
    return state


@compiled
def _free_edges(arena, state, waiting):
    edges, registers = arena.edges, arena.registers
    edge = np.int64(arena.states[state, MORE])
    place = 0
    while edge >= 0:
        waiting = _mark(arena, np.int64(edges[edge, EDGE_TARGET]), waiting)
        if place >= SCAN:
            arena.table[_table_find(arena, state, edges[edge, EDGE_TOKEN]), SLOT_STATE] = DELETED
        following = np.int64(edges[edge, EDGE_NEXT])
        edges[edge, EDGE_NEXT] = registers[EDGE_FREE]
        registers[EDGE_FREE] = edge
        registers[NUM_EDGES] -= 1
        edge = following
        place += 1
    return waiting
