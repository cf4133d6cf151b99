"""From rows to prompts in the model's tokens, each checked."""

import re
import string
from collections.abc import Sequence
from typing import Any

import msgspec

from echelon.config import DataConfig, RunConfig
from echelon.prompt_files import encode_prompt
from echelon.rows import Rows

BATCH_ROWS = 1024


def prompt_lines(
    key: str, rows: Rows, config: RunConfig, tokenizer: Any, vocab_size: int, tools: Sequence[dict[str, Any]] = ()
) -> list[bytes]:
    """The rows' lines of a prompt file.

    Args: key: the setting that the rows came from, for messages. tokenizer: a transformers tokenizer. tools: JSON
        schemas, which a chat template writes into the prompt.
    Raises: ValueError, in one line naming the row, for a template or a prompt that cannot be used.
    """
    prompts = format_prompts(key, rows, config.data, tokenizer, tools)
    token_ids: list[list[int]] = []
    for start in range(0, len(prompts), BATCH_ROWS):
        # A chat template writes the special tokens itself.
        batch = tokenizer(prompts[start : start + BATCH_ROWS], add_special_tokens=not config.data.chat)
        token_ids += batch["input_ids"]
    check_lengths(key, token_ids, config.rollout.context_tokens)
    check_vocabulary(key, token_ids, vocab_size)
    try:
        return [encode_prompt(*columns) for columns in zip(prompts, token_ids, rows, strict=True)]
    except (TypeError, msgspec.MsgspecError) as error:
        raise ValueError(f"{key}: a row cannot be written as JSON, for the reward function: {error}") from None


def format_prompts(
    key: str, rows: Rows, data: DataConfig, tokenizer: Any, tools: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """`data.prompt` filled in with each row, as a chat's first turn where `data.chat` asks for it."""
    check_template(key, data.prompt, rows[0])
    texts = [_fill(key, data.prompt, number, row) for number, row in enumerate(rows, start=1)]
    return [_as_chat(text, data.system, tokenizer, tools) for text in texts] if data.chat else texts


def check_template(key: str, template: str, row: dict[str, Any]) -> None:
    """Raises: ValueError for a template that is malformed or names a field that rows do not have."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"data.prompt={template!r} is malformed: {error}; write {{{{ and }}}} for braces") from None
    for name in (re.split(r"[.\[]", name)[0] for name in names):  # of {prompt[0][content]}, prompt
        if name not in row:
            raise ValueError(
                f"data.prompt names the field {{{name}}}, which {key} does not have: its fields are {', '.join(row)}"
            )


def _fill(key: str, template: str, number: int, row: dict[str, Any]) -> str:
    try:
        text = template.format_map(row)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"data.prompt={template!r} does not fit row {number} of {key}: {reason}") from None
    if not text.strip():
        raise ValueError(f"{key}: row {number} gives an empty prompt")
    return text


def _as_chat(text: str, system: str, tokenizer: Any, tools: Sequence[dict[str, Any]]) -> str:
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    more = {"tools": list(tools)} if tools else {}
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)


def check_lengths(key: str, token_ids: Sequence[Sequence[int]], context_tokens: int) -> None:
    """A prompt must be there, and leave room for an answer. Raises: ValueError naming the first that does not."""
    for number, ids in enumerate(token_ids, start=1):
        if not ids:
            raise ValueError(f"{key}: the prompt of row {number} has no tokens")
        if len(ids) >= context_tokens:
            raise ValueError(
                f"{key}: the prompt of row {number} has {len(ids)} tokens, which leaves no room for an answer in "
                f"rollout.context_tokens={context_tokens}: raise it, or leave the row out"
            )


def check_vocabulary(key: str, token_ids: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises: ValueError where the tokenizer gives tokens that the model does not have."""
    largest = max(max(ids) for ids in token_ids)
    if largest >= vocab_size:
        raise ValueError(
            f"{key}: the tokenizer gives token {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "tokenizer and model do not belong together"
        )
