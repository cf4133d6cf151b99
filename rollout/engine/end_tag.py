"""The text that ends the thinking, as tokens: where it stands in a completion, and what has to be forced."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from databus.codec import Array

Decode = Callable[[Sequence[int]], str]


class EndTag:
    """A tag of one token is looked for by its id; a longer one in the text, as its neighbours may change its tokens.

    What is forced are always the tokens that the tag has when it stands alone.
    """

    def __init__(self, text: str, token_ids: Sequence[int], decode: Decode) -> None:
        """Args: decode: token ids to text, special tokens included. Raises: ValueError for a tag without tokens."""
        if not token_ids:
            raise ValueError(f"rollout.reasoning.end is {text!r}, which the tokenizer gives no tokens")
        self._text = text
        self._token_ids = np.array(token_ids, np.int32)
        self._decode = decode

    def __len__(self) -> int:
        """Tokens that it has when it stands alone."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        return self._token_ids.tolist()

    def find(self, token_ids: Array) -> int | None:
        """How many tokens there are up to the end of the first tag; None where there is none."""
        if len(self) == 1:
            places = np.flatnonzero(token_ids == self._token_ids[0])
            return int(places[0]) + 1 if len(places) else None
        tokens = token_ids.tolist()
        if self._text not in self._decode(tokens):
            return None
        # Text only grows with tokens, so that what has the tag goes on having it.
        return bisect_left(range(len(tokens)), True, key=lambda count: self._text in self._decode(tokens[:count]))

    def missing(self, token_ids: Array) -> Array:
        """int32: the tag's tokens, less those of its beginning that the completion ends with."""
        for begun in range(min(len(self) - 1, len(token_ids)), 0, -1):
            if np.array_equal(token_ids[-begun:], self._token_ids[:begun]):
                return self._token_ids[begun:]
        return self._token_ids


def load_end_tag(model: str, text: str) -> EndTag:
    """The tag in the tokens of a model, a folder or hub id."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return end_tag(tokenizer, text)


def end_tag(tokenizer: Any, text: str) -> EndTag:
    """Args: tokenizer: of transformers. Raises: ValueError for a tag that it cannot write."""
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    if text not in decode(token_ids):
        raise ValueError(f"rollout.reasoning.end is {text!r}, which the tokenizer cannot write: it gives {token_ids}")
    return EndTag(text, token_ids, decode)
