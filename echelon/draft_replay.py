"""Replays recorded groups through a drafter, as if an engine were sampling them now.

The completions of a group advance together, as in a running batch. In each round every one of them is drafted for,
accepts the longest beginning of its draft that the record goes on with, and one token more; those go back to the
drafter. So drafts come from what the drafter has seen up to then, and from siblings that are as far.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from databus.codec import Array
from databus.history import KEY_MASK
from echelon.rollout_record import RolloutRecord


class Round(NamedTuple):
    """drafted, accepted: int64 [R], draft tokens of each completion that was still running."""

    drafted: Array
    accepted: Array


class Replayer(Protocol):
    def replay(self, record: RolloutRecord) -> Iterator[Round]:
        """The rounds that the completions of a group take; groups must come in their order."""
        ...


class Speculator(Protocol):
    """What is measured: it drafts for the completions of one group at a time."""

    def begin(self, record: RolloutRecord) -> None: ...

    def propose(self, rows: Sequence[int], new: Sequence[Array], scheduled: int, first: bool) -> list[Array]:
        """A draft for each of `rows`, which are completions of the group, after their `new` tokens.

        Args: scheduled: tokens that the step before computed. first: that step was the prompt's.
        """
        ...

    def end(self) -> None: ...


class GroupReplayer:
    """Any `Speculator` as a `Replayer`. propose_s: seconds that it took to draft."""

    def __init__(self, speculator: Speculator) -> None:
        self._speculator = speculator
        self.propose_s = 0.0

    def replay(self, record: RolloutRecord) -> Iterator[Round]:
        completions = record.completions()
        self._speculator.begin(record)
        # The step that reads the prompt gives the first token; there is no draft for it.
        new = {row: tokens[:1] for row, tokens in enumerate(completions) if len(tokens)}
        left = {row: completions[row][1:] for row in new}
        scheduled, first = len(record.prompt()), True
        while new:
            started = time.perf_counter()
            drafts = self._speculator.propose(list(new), list(new.values()), scheduled, first)
            self.propose_s += time.perf_counter() - started
            # Whoever has ended is told of its last tokens, as in an engine, but drafts nothing any more.
            running = [(row, draft) for row, draft in zip(new, drafts, strict=True) if len(left[row])]
            accepted = [num_equal(draft, left[row]) for row, draft in running]
            if running:
                yield Round(np.array([len(draft) for _, draft in running]), np.array(accepted))
            new = {row: left[row][: kept + 1] for (row, _), kept in zip(running, accepted, strict=True)}
            left = {row: left[row][len(tokens) :] for row, tokens in new.items()}
            scheduled, first = sum(len(draft) + 1 for _, draft in running), False
        self._speculator.end()


def num_equal(draft: Array, tokens: Array) -> int:
    """How many tokens of a draft are right."""
    size = min(len(draft), len(tokens))
    wrong = np.flatnonzero(draft[:size] != tokens[:size])
    return int(wrong[0]) if len(wrong) else size


@dataclass
class Tally:
    """Sums over rounds; a round is one completion's."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, one: Round) -> None:
        self.rounds += len(one.drafted)
        self.drafted += int(one.drafted.sum())
        self.accepted += int(one.accepted.sum())

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / max(1, self.rounds)

    @property
    def acceptance(self) -> float:
        """Of what was drafted, the share that was right."""
        return self.accepted / max(1, self.drafted)


# ---------------------------------------------------------------- drafters


class EchelonSpeculator:
    """Our own (`rollout.drafting`). drafter: its `Drafter`; it has made all completions itself, so needs no history.

    max_tokens: of any completion, as the run allowed them. Their true lengths would tell it where to stop.
    """

    def __init__(self, drafter: Any, max_tokens: int) -> None:
        self._drafter = drafter
        self._max_tokens = max_tokens
        self._slots: dict[int, int] = {}

    def begin(self, record: RolloutRecord) -> None:
        self._drafter.set_version(record.newest_version())
        self._slots = {
            row: self._drafter.add(
                problem=record.problem,
                prompt_ids=record.prompt(),
                history=(),
                predicted_tokens=0,
                group=xxhash.xxh3_64_intdigest(record.group_id.encode()) & KEY_MASK,
                max_tokens=self._max_tokens,
            )
            for row in range(len(record.completions()))
        }

    def propose(self, rows: Sequence[int], new: Sequence[Array], scheduled: int, first: bool) -> list[Array]:
        self._remove(set(self._slots) - set(rows))
        drafts, counts = self._drafter.propose(
            np.array([self._slots[row] for row in rows], np.int32),
            np.concatenate(new).astype(np.int32),
            np.array([len(tokens) for tokens in new], np.int32),
            decode_only=not first,
            num_scheduled_tokens=scheduled,
        )
        return [draft[:count] for draft, count in zip(drafts, counts, strict=True)]

    def end(self) -> None:
        self._remove(set(self._slots))

    def _remove(self, rows: set[int]) -> None:
        for row in sorted(rows):
            self._drafter.remove(self._slots.pop(row))


class ArcticSpeculator:
    """arctic-inference's suffix trees, used as vLLM 0.32.0 uses them: one tree a prompt, and one of all responses."""

    def __init__(self, max_tokens: int, depth: int = 64, factor: float = 1.0, min_probability: float = 0.1) -> None:
        from arctic_inference.suffix_decoding import (  # pyright: ignore[reportMissingImports]
            SuffixDecodingCache,
        )

        self._cache: Any = SuffixDecodingCache(max_tree_depth=depth, max_cached_requests=10_000)
        self._depth = depth
        self._options = {
            "max_spec_tokens": max_tokens,
            "max_spec_factor": factor,
            "min_token_prob": min_probability,
        }
        self._texts: dict[int, Array] = {}
        self._group = ""

    def begin(self, record: RolloutRecord) -> None:
        self._group = record.group_id
        self._texts = {row: record.prompt().copy() for row in range(len(record.completions()))}
        for row, prompt in self._texts.items():
            self._cache.start_request(self._name(row), prompt)

    def propose(self, rows: Sequence[int], new: Sequence[Array], scheduled: int, first: bool) -> list[Array]:
        drafts = []
        for row, tokens in zip(rows, new, strict=True):
            self._cache.add_active_response(self._name(row), tokens.tolist())
            self._texts[row] = np.concatenate((self._texts[row], tokens))[-self._depth :]
            draft = self._cache.speculate(self._name(row), self._texts[row], **self._options)
            drafts.append(np.array(draft.token_ids, np.int32))
        return drafts

    def end(self) -> None:
        for row in self._texts:
            self._cache.stop_request(self._name(row))

    def _name(self, row: int) -> str:
        return f"{self._group}:{row}"


def arctic_is_installed() -> bool:
    return find_spec("arctic_inference") is not None
