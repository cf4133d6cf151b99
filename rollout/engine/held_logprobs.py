"""Log-probabilities that wait in the engine core until somebody looks at them.

vLLM hands out every token's on its own, in three arrays whose decoding is the largest part of what a token costs the
process that asked for it. A request that looks at its output every `stream_interval` tokens is served as well by fewer
and longer arrays; its tokens still come one by one, for vLLM tells by them which weights each is of.
"""

from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np

HELD_TOKENS = 64
"""Longest that is held: beyond it there is little to save, and the arrays would fill the memory."""


class HeldLogprobs:
    """Of the requests of one scheduler. What it is given are vLLM's `EngineCoreOutput`s, in order."""

    def __init__(self) -> None:
        self._held: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def pass_through(self, outputs: Iterable[Any], interval_of: Callable[[str], int]) -> None:
        """Take from these outputs what can wait, and give them what has waited long enough.

        Args: interval_of: tokens after which a request, by its id, looks at its output.
        """
        for output in outputs:
            held = self._held.get(output.request_id)
            if held is None:
                if output.finished or output.new_logprobs is None or interval_of(output.request_id) <= 1:
                    continue
                held = self._held[output.request_id] = []
            if output.new_logprobs is not None:
                held.append(output.new_logprobs)
            output.new_logprobs = None
            if output.finished:
                del self._held[output.request_id]
            if held and (output.finished or len(held) >= HELD_TOKENS):
                output.new_logprobs = merged(held)
                held.clear()

    def keep_only(self, unfinished: Container[str]) -> None:
        """Others were aborted: nothing more is handed out of them."""
        for request_id in [each for each in self._held if each not in unfinished]:
            del self._held[request_id]


def merged(parts: list[Any]) -> Any:
    """One `LogprobsLists` of the positions of all of them. Its first three fields are arrays of a row a position."""
    return type(parts[0])(*(np.concatenate([part[field] for part in parts]) for field in range(3)))
