"""What is known of the requests that are running: one row a slot, in arrays that the compiled rounds work on."""

from typing import NamedTuple

import numpy as np

from databus.codec import Array


class Running(NamedTuple):
    """N slots, at most K draft tokens each, texts of at most T tokens.

    last, bound, length [N]: where the request's text stands in its problem's automaton, as `automaton.write` has it.
    common, common_length [N]: its match in the automaton that all problems share.
    writer [N]: who writes, see `writer_of`. room [N]: tokens that it may still get. weight [N] float32: what a token
    of it is worth, 1 for an ordinary request. budget [N]: draft tokens that the logarithmic policy allows.
    barren [N]: rounds since something was last found to draft.
    text [N, T], text_length [N]: its completion so far.
    ends [up to 16]: tokens that end a text, -1 where there are fewer.
    drafts [N + 1, K], num_drafts [N]: what was drafted last. cells [N + 1, K]: each token's cell in the calibration.
    survival [N + 1, K] float32: chance that it and all before it are accepted. sources, lags [N + 1, K]: where it came
    from. The last row of these is for drafts that may not be taken.
    """

    last: Array
    bound: Array
    length: Array
    common: Array
    common_length: Array
    writer: Array
    room: Array
    weight: Array
    budget: Array
    barren: Array
    text: Array
    text_length: Array
    ends: Array
    drafts: Array
    num_drafts: Array
    cells: Array
    survival: Array
    sources: Array
    lags: Array


def new_running(num_slots: int, max_drafts: int, max_text: int) -> Running:
    def ints(*shape: int) -> Array:
        return np.zeros(shape, np.int32)

    n, k = num_slots, max_drafts
    return Running(
        last=ints(n),
        bound=ints(n),
        length=ints(n),
        common=ints(n),
        common_length=ints(n),
        writer=ints(n),
        room=ints(n),
        weight=np.ones(n, np.float32),
        budget=ints(n),
        barren=ints(n),
        text=ints(n, max_text),
        text_length=ints(n),
        ends=np.full(MAX_ENDS, -1, np.int32),
        drafts=ints(n + 1, k),
        num_drafts=ints(n),
        cells=ints(n + 1, k),
        survival=np.zeros((n + 1, k), np.float32),
        sources=ints(n + 1, k),
        lags=ints(n + 1, k),
    )


MAX_ENDS = 16
SIBLING_BITS = 10


def writer_of(group: int, sibling: int) -> int:
    """A positive int32 that tells who wrote a text: 21 bits of its group, and its place among the siblings."""
    return (group & ((1 << 21) - 1)) << SIBLING_BITS | (sibling & ((1 << SIBLING_BITS) - 1))
