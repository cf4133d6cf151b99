"""The automata of an engine's problems: which texts each holds, for how long, and how much room they take together."""

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from databus.codec import Array
from rollout.drafting.automaton import (
    FULL,
    NUM_STATES,
    count_out,
    free_automaton,
    grow,
    has_room,
    new_arena,
    new_state,
    write,
)
from rollout.drafting.compiled import refresh_cache

logger = logging.getLogger(__name__)

GROWTH = 1.3
FIRST_TOKENS = 16_384
MIN_GARBAGE = 2_048
"""Tokens that have been counted out before building anew is worth while."""
COMMON = 0
"""The key of the automaton that all problems share."""
COMMON_SHARE = 8
"""It holds at most one in so many of all tokens."""
PROMPT_WRITER = -1


class Cursor(NamedTuple):
    """Where a text ends: its state, and state and number of its last tokens, at most DEPTH; see `automaton.write`."""

    last: int
    bound: int
    length: int


class Text(NamedTuple):
    """A finished completion: int32 [t], the version that sampled it, who wrote it, and what it is known by."""

    tokens: Array
    version: int
    writer: int
    identity: int


@dataclass
class Problem:
    """One automaton.

    start: where completions begin, behind the prompt. texts: finished ones, oldest first. running: slots whose text
    grows here. written: tokens that the automaton was made of, and one for each text. counted: those that still count.
    """

    key: int
    prompt: Array
    root: int
    start: Cursor
    texts: deque[Text] = field(default_factory=deque)
    known: set[int] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    written: int = 0
    counted: int = 0


class SuffixIndex:
    """Automata of many problems in one arena that grows as needed, up to about `max_tokens` tokens.

    window: texts sampled more than so many versions ago are taken out. Beyond `max_tokens`, whole problems go, the
    least recently used first, but none that a request is running for.

    num_tokens: tokens that the automata were made of, and one for each text.
    """

    def __init__(self, max_tokens: int, window: int, vocab_size: int) -> None:
        refresh_cache()
        self._max_tokens = max_tokens
        self._window = window
        self._vocab_size = vocab_size
        self._problems: OrderedDict[int, Problem] = OrderedDict()
        self.num_tokens = 0
        self._text_bytes = 0
        self.version = 0
        self.arena = new_arena(2 * FIRST_TOKENS, FIRST_TOKENS)
        self.common = self._new_problem(COMMON, np.zeros(0, np.int32))

    def __len__(self) -> int:
        """Problems held."""
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the arena and of the texts that are finished."""
        return sum(array.nbytes for array in self.arena) + self._text_bytes

    def problem(self, key: int, prompt: Array) -> Problem:
        """The problem, made or found; it is then the one most recently used. Raises: ValueError for wrong token ids."""
        problem = self._problems.get(key)
        if problem is None:
            problem = self._problems[key] = self._new_problem(key, self.checked(prompt))
        self._problems.move_to_end(key)
        return problem

    def add(self, problem: Problem, text: Text) -> None:
        """Take in a finished completion, unless it is known or too old."""
        if text.identity in problem.known or text.version < self.version - self._window:
            return
        self.reserve(len(text.tokens) + 1)
        self._write(problem, text.tokens, text.version, text.writer)
        self.keep(problem, text)

    def keep(self, problem: Problem, text: Text) -> None:
        """Remember a text that the automaton has already."""
        problem.texts.append(text)
        self._text_bytes += text.tokens.nbytes
        problem.known.add(text.identity)

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens more."""
        if not has_room(self.arena, self.num_tokens, num_tokens):
            states = int(GROWTH * (self.arena.registers[NUM_STATES] + 2 * num_tokens))
            self.arena = grow(self.arena, states, int(GROWTH * (self.num_tokens + num_tokens)))

    def grew(self, problem: Problem, num_tokens: int) -> None:
        """A running text of the problem has been written on."""
        self.num_tokens += num_tokens
        problem.written += num_tokens
        problem.counted += num_tokens

    def is_worn(self, problem: Problem) -> bool:
        """Whether most of it no longer counts."""
        garbage = problem.written - problem.counted
        return garbage > MIN_GARBAGE and garbage > problem.counted

    def expire(self, problem: Problem) -> None:
        """Count out what the window has left behind."""
        while problem.texts and problem.texts[0].version < self.version - self._window:
            self._count_out_oldest(problem)

    def share(self, text: Text) -> None:
        """Take a completion into the automaton that all problems share; its oldest go."""
        common = self.common
        self.expire(common)
        while common.texts and common.counted + len(text.tokens) > self._max_tokens // COMMON_SHARE:
            self._count_out_oldest(common)
        if len(text.tokens) <= self._max_tokens // COMMON_SHARE:
            self.add(common, text)

    def rebuild(self, problem: Problem) -> None:
        """Make its automaton anew, of what still counts. Running texts are the caller's to write again."""
        self._free(problem)
        fresh = self._new_problem(problem.key, problem.prompt)
        problem.root, problem.start = fresh.root, fresh.start
        problem.written, problem.counted = fresh.written, fresh.counted
        for text in problem.texts:
            self.reserve(len(text.tokens) + 1)
            self._write(problem, text.tokens, text.version, text.writer)

    def write_running(self, problem: Problem, tokens: Array, writer: int) -> Cursor:
        """Write what a running request has so far. Returns: where it goes on."""
        self.reserve(len(tokens) + 1)
        return self._write(problem, tokens, self.version, writer)

    def trim(self) -> None:
        """Drop problems that were not used for longest, while there are more tokens than there should be."""
        if self.num_tokens <= self._max_tokens:
            return
        for key, problem in list(self._problems.items()):
            if self.num_tokens <= self._max_tokens:
                break
            if not problem.running:
                self._text_bytes -= sum(text.tokens.nbytes for text in problem.texts)
                self._free(problem)
                del self._problems[key]

    def checked(self, tokens: Array) -> Array:
        """Raises: ValueError for ids outside of the vocabulary, or what is no row of integers."""
        row = np.asarray(tokens)
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise ValueError(f"token ids must be a row of integers, not {row.dtype} of shape {row.shape}")
        if row.size and (row.min() < 0 or row.max() >= self._vocab_size):
            raise ValueError(f"token ids must lie in 0..{self._vocab_size - 1}, not {row.min()}..{row.max()}")
        return np.ascontiguousarray(row, np.int32)

    def _new_problem(self, key: int, prompt: Array) -> Problem:
        self.reserve(len(prompt) + 1)
        root = int(new_state(self.arena, 0, -1))
        problem = Problem(key=key, prompt=prompt, root=root, start=Cursor(root, root, 0))
        problem.start = self._write(problem, prompt, self.version, PROMPT_WRITER)
        return problem

    def _write(self, problem: Problem, tokens: Array, version: int, writer: int) -> Cursor:
        last, bound, length = write(self.arena, *problem.start, tokens, version, writer)
        if self.arena.registers[FULL]:
            raise MemoryError("the suffix automata have outgrow their arena")
        self.grew(problem, len(tokens) + 1)
        return Cursor(int(last), int(bound), int(length))

    def _count_out_oldest(self, problem: Problem) -> None:
        text = problem.texts.popleft()
        self._text_bytes -= text.tokens.nbytes
        problem.known.discard(text.identity)
        count_out(self.arena, problem.start.bound, problem.start.length, text.tokens)
        problem.counted -= len(text.tokens) + 1

    def _free(self, problem: Problem) -> None:
        free_automaton(self.arena, problem.root)
        self.num_tokens -= problem.written


def identity_of(group: int, tokens: Array) -> int:
    """What a completion is known by: its tokens and its group, a hash of the group's id; as in `databus.history`."""
    return xxhash.xxh3_64_intdigest(tokens.tobytes(), seed=group) & ((1 << 63) - 1) or 1
