"""History: the newest completions of each problem, which the broker keeps and sends with the problem's leases.

It is what a worker drafts from, so that one which has just joined drafts as well as one that was there all along.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from databus.codec import Array, Frame, MalformedMessage, decode_columns, encode_columns
from databus.config import HistoryConfig
from databus.groups import Group
from databus.messages import Column

KEY_MASK = (1 << 63) - 1
"""Keys have 63 bits: they fit a signed and an unsigned 64-bit integer alike."""

HISTORY_COLUMNS = {"token_ids": "<i4", "lengths": "<i4", "versions": "<i4", "ids": "<i8"}
"""Column name -> dtype, each of one dimension, H completions of T tokens together, newest last:

token_ids [T]; lengths [H] tokens a completion; versions [H]; ids [H]: see `PastCompletion`.
"""


class PastCompletion(NamedTuple):
    """version: the oldest policy version that sampled any of it. identity: `completion_id`. token_ids: int32 [t]."""

    version: int
    identity: int
    token_ids: Array


def problem_key(prompt_ids: Sequence[int]) -> int:
    """A stable hash of a prompt's tokens, in 1 .. 2^63 - 1; 0 stands for a problem that is not known."""
    return xxhash.xxh3_64_intdigest(np.array(prompt_ids, "<i4").tobytes()) & KEY_MASK or 1


def completion_id(group_id: str, token_ids: Array) -> int:
    """A stable hash of a completion's tokens and its group, in 1 .. 2^63 - 1.

    A worker's own completions come back to it as history; by this it can tell which ones it has.
    """
    tokens = np.ascontiguousarray(token_ids, "<i4").tobytes()
    return xxhash.xxh3_64_intdigest(tokens, seed=xxhash.xxh3_64_intdigest(group_id.encode())) & KEY_MASK or 1


# ---------------------------------------------------------------- what the broker keeps


@dataclass
class _Problem:
    """Completions of one problem, newest last, and how many tokens they have."""

    completions: deque[PastCompletion] = field(default_factory=deque)
    num_tokens: int = 0


class CompletionHistory:
    """Completions by problem, bounded as `HistoryConfig` says.

    A completion counts as new when it comes in: late groups of old versions are as new as any, until the window
    has passed them. Completions are kept whole, unless one alone fills all its problem's room: then its beginning is.
    """

    def __init__(self, config: HistoryConfig) -> None:
        self._config = config
        self._room = min(config.tokens, config.total_tokens)
        self._problems: OrderedDict[int, _Problem] = OrderedDict()
        """Least recently used first."""
        self.num_tokens = 0

    def __len__(self) -> int:
        """Problems that have a history."""
        return len(self._problems)

    def add(self, key: int, group_id: str, group: Group) -> None:
        """Keep the completions of a group of problem `key`; one that the group holds twice is kept once."""
        problem = self._problems.setdefault(key, _Problem())
        self._problems.move_to_end(key)
        for completion in _completions(group_id, group, self._room):
            problem.completions.append(completion)
            self._count(problem, len(completion.token_ids))
        while problem.num_tokens > self._room:
            self._count(problem, -len(problem.completions.popleft().token_ids))
        while self.num_tokens > self._config.total_tokens and len(self._problems) > 1:
            self._forget(next(iter(self._problems)))
        if not problem.completions:
            self._forget(key)

    def load(self, key: int, completions: Iterable[PastCompletion]) -> None:
        """Take what `items` gave for a problem that is not known here."""
        problem = self._problems.setdefault(key, _Problem())
        for completion in completions:
            kept = completion._replace(token_ids=completion.token_ids.copy())  # a view would keep its whole message
            problem.completions.append(kept)
            self._count(problem, len(kept.token_ids))

    def items(self) -> Iterator[tuple[int, tuple[PastCompletion, ...]]]:
        """(problem key, completions), least recently used first."""
        return ((key, tuple(problem.completions)) for key, problem in self._problems.items())

    def of(self, key: int, version: int) -> tuple[PastCompletion, ...]:
        """Completions of a problem, newest last, as policy `version` may use them."""
        problem = self._problems.get(key)
        if problem is None:
            return ()
        self._problems.move_to_end(key)
        self._drop_before(problem, version - self._config.window_versions)
        if not problem.completions:
            self._forget(key)
        return tuple(problem.completions)

    def _drop_before(self, problem: _Problem, oldest: int) -> None:
        if all(completion.version >= oldest for completion in problem.completions):
            return
        kept = deque(completion for completion in problem.completions if completion.version >= oldest)
        self._count(problem, sum(len(completion.token_ids) for completion in kept) - problem.num_tokens)
        problem.completions = kept

    def _forget(self, key: int) -> None:
        self.num_tokens -= self._problems.pop(key).num_tokens

    def _count(self, problem: _Problem, num_tokens: int) -> None:
        problem.num_tokens += num_tokens
        self.num_tokens += num_tokens


def _completions(group_id: str, group: Group, max_tokens: int) -> list[PastCompletion]:
    """The different completions of a group, cut to `max_tokens`, copied: a view would keep their whole message."""
    ends = np.cumsum(group.lengths)
    versions = group.token_versions()
    found: dict[int, PastCompletion] = {}
    for start, end in zip((ends - group.lengths).tolist(), ends.tolist(), strict=True):
        if end > start:
            identity = completion_id(group_id, group.token_ids[start:end])
            kept = slice(start, min(end, start + max_tokens))
            if identity not in found and kept.stop > start:
                found[identity] = PastCompletion(int(versions[kept].min()), identity, group.token_ids[kept].copy())
    return list(found.values())


# ---------------------------------------------------------------- the wire


def encode_history(completions: Sequence[PastCompletion]) -> tuple[tuple[Column, ...], list[Frame]]:
    """Columns as `HISTORY_COLUMNS`, and their frames; neither where there is no history."""
    if not completions:
        return (), []
    return encode_columns(
        {
            "token_ids": np.concatenate([completion.token_ids for completion in completions]).astype(np.int32),
            "lengths": np.array([len(completion.token_ids) for completion in completions], np.int32),
            "versions": np.array([completion.version for completion in completions], np.int32),
            "ids": np.array([completion.identity for completion in completions], np.int64),
        }
    )


def decode_history(columns: Sequence[Column], frames: Sequence[Frame]) -> tuple[PastCompletion, ...]:
    """The completions that came with a lease, newest last; their tokens are read-only views.

    Raises: MalformedMessage for a missing or unknown column, a wrong dtype or dimension, lengths that do not add up,
        an empty completion, or a negative token id, version or identity.
    """
    if not columns and not frames:
        return ()
    arrays = decode_columns(columns, frames)
    if arrays.keys() != HISTORY_COLUMNS.keys():
        wrong = sorted(arrays.keys() ^ HISTORY_COLUMNS.keys())
        raise MalformedMessage(f"history: missing or unknown columns: {', '.join(wrong)}")
    for name, dtype in HISTORY_COLUMNS.items():
        array = arrays[name]
        if array.dtype.str != dtype or array.ndim != 1:
            raise MalformedMessage(f"history: column {name!r} is {array.dtype.str} with {array.ndim} dimensions")
        if (array < 0).any():
            raise MalformedMessage(f"history: column {name!r} has a negative entry")
    lengths, versions, ids = arrays["lengths"], arrays["versions"], arrays["ids"]
    if not len(lengths) == len(versions) == len(ids):
        raise MalformedMessage("history: lengths, versions and ids differ in length")
    if (lengths == 0).any() or int(lengths.sum(dtype=np.int64)) != len(arrays["token_ids"]):
        raise MalformedMessage(f"history: lengths do not add up to {len(arrays['token_ids'])} tokens")
    parts = np.split(arrays["token_ids"], np.cumsum(lengths)[:-1])
    return tuple(map(PastCompletion, versions.tolist(), ids.tolist(), parts))
