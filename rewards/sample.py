"""What a reward function sees of one completion."""

from typing import Any

from msgspec import Struct


class Sample(Struct, frozen=True, kw_only=True):
    """One completion to score.

    prompt: the prompt as text, after its template. completion: the answer as text, without special tokens.
    problem: the data set's row. num_tokens: completion tokens, the end token included. truncated: it ended
    for want of room, not with an end token.
    """

    prompt: str
    completion: str
    problem: dict[str, Any]
    num_tokens: int
    truncated: bool
