"""Prompts as files of JSON lines, written once before a run and read by the broker.

A cursor counts prompts over all epochs. The order of an epoch follows from (seed, epoch) alone, so a
cursor means the same prompt for ever.
"""

import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from databus.prompts import Prompt
from echelon.files import write_atomically


class StoredPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the file. problem: the data set's row. prompt_ids: its prompt in the model's tokens."""

    prompt: str
    prompt_ids: tuple[int, ...]
    problem: msgspec.Raw


def encode_prompt(prompt: str, prompt_ids: list[int], problem: dict[str, Any]) -> bytes:
    """One line. Raises: TypeError for a row with something that JSON has no word for."""
    return msgspec.json.encode({"prompt": prompt, "prompt_ids": prompt_ids, "problem": problem}) + b"\n"


def write_prompts(file: Path, lines: Iterable[bytes]) -> None:
    write_atomically(file, b"".join(lines))


class PromptFile:
    """The prompts of a file, in an order drawn anew every epoch, or in the file's order."""

    def __init__(self, file: Path, seed: int, shuffle: bool) -> None:
        """Raises: ValueError where the file is missing or empty."""
        if not file.is_file():
            raise ValueError(f"{file} is missing: prepare has not run")
        self._lines = file.read_bytes().splitlines()
        if not self._lines:
            raise ValueError(f"{file} holds no prompts")
        self._decoder = msgspec.json.Decoder(StoredPrompt)
        self._seed = seed
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, cursor: int) -> Prompt:
        """The prompt at a cursor; every prompt comes once in each `len(self)` cursors."""
        return self.at(self.index_of(cursor))

    def index_of(self, cursor: int) -> int:
        """Which line of the file a cursor has."""
        epoch, place = divmod(cursor, len(self._lines))
        return self._order(epoch)[place] if self._shuffle else place

    def prompt_tokens(self) -> list[int]:
        """Tokens of every prompt, in the file's order."""
        return [len(self.at(index).prompt_ids) for index in range(len(self))]

    def at(self, index: int) -> Prompt:
        """The prompt on a line of the file."""
        stored = self._decoder.decode(self._lines[index])
        return Prompt(prompt=stored.prompt, prompt_ids=stored.prompt_ids, problem=bytes(stored.problem))

    def _draw_order(self, epoch: int) -> list[int]:
        order = list(range(len(self._lines)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


class ScheduledPrompts:
    """The prompts of a file, in the order that a scheduler chooses."""

    def __init__(self, file: PromptFile, problem_of: Callable[[int], int]) -> None:
        """Args: problem_of: the line of a cursor; the same whenever it is asked for the same cursor."""
        self._file = file
        self._problem_of = problem_of

    def get(self, cursor: int) -> Prompt:
        return self._file.at(self._problem_of(cursor))
