"""What a reward function sees of one completion."""

from typing import Any, Literal

from msgspec import Struct


class Message(Struct, frozen=True, kw_only=True):
    """A turn of the model, or what it was answered; text without special tokens."""

    role: Literal["assistant", "tool"]
    text: str


class Sample(Struct, frozen=True, kw_only=True):
    """One completion to score.

    prompt: the prompt as text, after its template. completion: the answer as text, without special tokens.
    problem: the data set's row. num_tokens: completion tokens, the end token included. truncated: it ended
    for want of room, not with an end token.
    Of an episode of several turns, completion is the model's last one, num_tokens counts all, answers included, and
    truncated says that it ended before its environment was done. transcript: all turns and answers, in order.
    environment: parts of the reward that the environment has given; they are added to the function's. Both are empty
    elsewhere.
    """

    prompt: str
    completion: str
    problem: dict[str, Any]
    num_tokens: int
    truncated: bool
    transcript: tuple[Message, ...] = ()
    environment: dict[str, float] = {}
