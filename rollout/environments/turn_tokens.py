"""What stands between two turns of the model, as tokens.

    … sampled, end of turn │ before │ answer │ after │ sampled …

The model's own tokens are never decoded and encoded again, so the whole conversation is never rendered: `before` and
`after` are taken from the chat template once, by rendering a conversation of markers, and encoded alone; the answer is
encoded alone, so that nothing it says becomes a special token. What the model has sampled stays as it is, if only
because no two of these pieces are ever encoded together.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from databus.codec import Array
from rollout.config import EnvironmentConfig

QUESTION, TURN, ANSWER = "QUESTION7e1f", "TURN7e1f", "ANSWER7e1f"
CUT = "\n[the rest is cut off]"
CHARACTERS_A_TOKEN = 64
"""More than a token has, but for rows of blanks: of a longer answer, the tokenizer sees only the beginning."""


class TurnTokens:
    """Tokens for a model's tokenizer and an environment's settings."""

    def __init__(self, tokenizer: Any, config: EnvironmentConfig) -> None:
        """Args: tokenizer: of transformers. Raises: ValueError, one line, where the chat template has no answers."""
        self._tokenizer = tokenizer
        self._room = config.output_tokens
        before, after = (config.before, config.after) if config.before or config.after else template(tokenizer, config)
        self.before = self._encode(before)
        self.after = self._encode(after)
        # Some tokenizers have runs of blanks among them, which say nothing.
        added = {text: index for text, index in tokenizer.get_added_vocab().items() if len(text.strip()) > 1}
        self._never = {*tokenizer.all_special_ids, *added.values()}
        self._breakable = _inside([*added, *(text for text in tokenizer.all_special_tokens if len(text) > 1)])
        self._cut = self._plain(CUT)

    def between(self, end_token: int, answer: str) -> Array:
        """int32: what follows a turn that ended with `end_token`, which is not said twice."""
        before = self.before[1:] if self.before[:1] == [end_token] else self.before
        return np.array([*before, *self._answer(answer), *self.after], np.int32)

    def _answer(self, text: str) -> list[int]:
        limit = self._room * CHARACTERS_A_TOKEN
        token_ids = self._plain(text[:limit])
        if len(text) <= limit and len(token_ids) <= self._room:
            return token_ids
        return token_ids[: self._room] + self._cut

    def _plain(self, text: str) -> list[int]:
        """Without special tokens: text that reads as one is broken in two; what then still is one, is left out."""
        clean = text.encode("utf-8", "replace").decode()
        cuts = [0, *(match.start() + 1 for match in self._breakable.finditer(clean)), len(clean)]
        pieces = [clean[start:end] for start, end in pairwise(cuts)]
        return [index for piece in pieces for index in self._encode(piece) if index not in self._never]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []


def load_turn_tokens(model: str, config: EnvironmentConfig) -> TurnTokens:
    """Args: model: a folder or hub id. Raises: as `TurnTokens`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return TurnTokens(tokenizer, config)


def template(tokenizer: Any, config: EnvironmentConfig) -> tuple[str, str]:
    """(before, after): what the chat template writes around an answer, up to where the model goes on.

    Raises: ValueError, one line, where there is no template, or it does not write an answer just once.
    """
    hint = "set rollout.environment.before and rollout.environment.after to what stands around an answer"
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"rollout.environment: the model's tokenizer has no chat template: {hint}")
    messages = [("user", QUESTION), ("assistant", TURN), (config.role, ANSWER)]
    conversation = [{"role": role, "content": text} for role, text in messages]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())
        other = "user" if config.role == "tool" else "tool"
        raise ValueError(
            f"rollout.environment.role={config.role}: the chat template refuses it ({reason}): try {other}, or {hint}"
        ) from None
    found = re.fullmatch(rf".*{TURN}(.*){ANSWER}(.*)", text, re.DOTALL)
    if found is None or text.count(TURN) != 1 or text.count(ANSWER) != 1:
        raise ValueError(f"rollout.environment.role={config.role}: the chat template leaves such messages out: {hint}")
    return found[1], found[2]


def _inside(texts: Sequence[str]) -> re.Pattern[str]:
    """Finds every place where one of the texts begins, overlapping ones too."""
    return re.compile(f"(?={'|'.join(map(re.escape, texts))})") if texts else re.compile(r"(?!)")
