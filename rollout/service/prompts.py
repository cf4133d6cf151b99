"""From a request's prompts to token ids, each checked before anything is generated."""

from typing import Any, NamedTuple

from rollout.service.errors import ServiceError
from rollout.service.protocol import Prompt


class ReadPrompt(NamedTuple):
    """text: what was tokenised, after the template; of token ids, what they decode to."""

    text: str
    token_ids: tuple[int, ...]
    problem: dict[str, Any]


class PromptReader:
    """With one model's tokenizer. Slow for many long prompts: call it in a thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, context_tokens: int) -> None:
        """Args: tokenizer: a transformers tokenizer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens

    def read(self, prompts: list[Prompt]) -> list[ReadPrompt]:
        """Raises: ServiceError naming the first prompt that cannot be completed."""
        return [self._read(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]

    def _read(self, name: str, prompt: Prompt) -> ReadPrompt:
        given = [each for each in (prompt.text, prompt.messages, prompt.token_ids) if each is not None]
        if len(given) != 1:
            raise ServiceError(400, f"{name}: expected one of text, messages and token_ids, got {len(given)}", name)
        text, ids = self._token_ids(name, prompt)
        if not ids:
            raise ServiceError(400, f"{name} is empty: expected at least one token", name)
        wrong = next((each for each in ids if not 0 <= each < self._vocab_size), None)
        if wrong is not None:
            raise ServiceError(400, f"{name}: token id {wrong} is not of 0 to {self._vocab_size - 1}", name)
        if len(ids) >= self._context_tokens:
            raise ServiceError(
                400,
                f"{name} has {len(ids)} tokens, and the context {self._context_tokens}: no room for a completion",
                name,
                type="context_length_exceeded",
            )
        return ReadPrompt(self._decoded(ids) if text is None else text, tuple(ids), prompt.problem)

    def _token_ids(self, name: str, prompt: Prompt) -> tuple[str | None, list[int]]:
        if prompt.token_ids is not None:
            return None, prompt.token_ids
        if prompt.text is not None:
            return prompt.text, self._encoded(prompt.text, special=True)
        text = self._as_chat(name, prompt.messages or [])
        return text, self._encoded(text, special=False)  # a chat template writes the special tokens itself

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def _as_chat(self, name: str, messages: list[dict[str, Any]]) -> str:
        if not self._tokenizer.chat_template:
            raise ServiceError(400, f"{name} has messages, and this model no chat template: send text", name)
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template makes of messages that it was not written for
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ServiceError(400, f"{name}: the chat template does not take these messages: {reason}", name) from None
