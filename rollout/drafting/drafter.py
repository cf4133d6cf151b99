"""Drafts for the whole running batch of an engine: what the proposer asks, once a round."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from databus.codec import Array
from rollout.config import DraftConfig
from rollout.drafting.automaton import DEPTH, follow
from rollout.drafting.budget import BINS, allocate, logarithmic_budget
from rollout.drafting.calibration import new_calibration
from rollout.drafting.counters import LAGS, SOURCES
from rollout.drafting.index import Problem, SuffixIndex, Text, identity_of
from rollout.drafting.latency import LatencyModel
from rollout.drafting.rounds import (
    ACCEPTED,
    BY_LAG,
    BY_SOURCE,
    DRAFTED,
    NUM_COUNTERS,
    ROUNDS,
    collect,
    play,
)
from rollout.drafting.running import MAX_ENDS, new_running, writer_of

TYPICAL_KEEP = 0.99
GROUP_WEIGHT = 0.5
"""The last request of a group is worth so much more than an ordinary one: the group waits for it."""
PROMPT_TAIL = DEPTH


class Drafter:
    """Suffix automata, budget and latency model of one engine; N = max_sequences slots, K = config.max_tokens.

    policy `off` drafts nothing, but still learns what it is given.
    """

    def __init__(
        self,
        config: DraftConfig,
        *,
        max_sequences: int,
        vocab_size: int,
        context_tokens: int,
        latency: LatencyModel | None = None,
    ) -> None:
        self._config = config
        self._index = SuffixIndex(config.index_tokens, config.window_versions, vocab_size)
        self._running = new_running(max_sequences, config.max_tokens, context_tokens)
        self._problems: dict[int, Problem] = {}
        self._groups: dict[int, set[int]] = {}
        self._group_of: dict[int, int] = {}
        self._joined: dict[int, int] = {}
        self._free = list(range(max_sequences))[::-1]
        self._calibration = new_calibration()
        self._classes = (np.zeros(BINS, np.int64), np.zeros(BINS))
        self._latency = latency or LatencyModel()
        self._counters = np.zeros(NUM_COUNTERS, np.int64)
        self._propose_s = 0.0
        self._proposals = 0
        self._typical_tokens = 0.0
        self._counted_up_to = [0] * max_sequences  # tokens of a running text that its problem's totals have
        self._left_at = 0.0
        self._last_rows = 0

    def add(
        self,
        *,
        problem: int,
        prompt_ids: Array,
        history: Sequence[tuple[int, int, Array]] = (),
        predicted_tokens: int = 0,
        group: int = 0,
        max_tokens: int,
        end_tokens: Sequence[int] = (),
    ) -> int:
        """A request begins. Returns: its slot.

        Args: problem, group: 64-bit keys. prompt_ids: int32 [P]. history: (policy version, identity, int32 [t]) of
            completions of the problem, newest last; those it knows by their identity (`databus.history`; 0: none), or
            that have left the window, are skipped. predicted_tokens: 0: unknown. max_tokens: what the request may
            generate. end_tokens: those that end it.
        Raises: ValueError for token ids outside of the vocabulary, or more requests than slots.
        """
        if not self._free:
            raise ValueError(f"more than {len(self._running.last)} requests at once")
        found = self._index.problem(problem or 1, prompt_ids)
        for version, identity, tokens in history:
            row = self._index.checked(tokens)
            self._index.add(found, Text(row, version, writer_of(0, 0), identity or identity_of(0, row)))
        self._index.expire(found)
        if self._index.is_worn(found):
            self._rebuild(found)
        slot = self._free.pop()
        self._running.ends[: len(end_tokens)] = end_tokens[:MAX_ENDS]
        self._begin(slot, found, group, max_tokens, predicted_tokens)
        self._go_on_from(slot, found, self._index.checked(prompt_ids))
        return slot

    def remove(self, slot: int) -> None:
        """A request has ended; its text stays, as a finished sibling's. Raises: KeyError for a slot not in use."""
        problem = self._problems.pop(slot)
        problem.running.discard(slot)
        group = self._leave_group(slot)
        row = self._running
        tokens = row.text[slot, : row.text_length[slot]].copy()
        self._account(slot, problem)
        row.num_drafts[slot] = 0
        self._free.append(slot)
        if len(tokens):
            self._finish(problem, tokens, int(row.writer[slot]), group)
        self._index.trim()

    def set_version(self, version: int) -> None:
        """The policy version that samples from now on."""
        self._index.version = version
        self._index.expire(self._index.common)

    def propose(
        self, slots: Array, tokens: Array, counts: Array, *, decode_only: bool, num_scheduled_tokens: int
    ) -> tuple[Array, Array]:
        """A round.

        Args: slots: int32 [R]. tokens: int32 [sum of counts]: newly sampled ones, row by row. counts: int32 [R], 0
            where a row has got none. decode_only: the step that has just run held no prefill.
            num_scheduled_tokens: what it computed.
        Returns: drafts int32 [R, K] and their numbers int32 [R].
        """
        started = time.perf_counter()
        if decode_only and self._left_at and self._last_rows == len(slots):
            self._latency.observe(started - self._left_at, len(slots), num_scheduled_tokens)
        drafts = np.zeros((len(slots), self._config.max_tokens), np.int32)
        num_drafts = np.zeros(len(slots), np.int32)
        self._play(slots, tokens, counts)
        if self._config.policy != "off":
            self._shorten(slots)
            collect(self._running, slots, self._counters, drafts, num_drafts)
        self._left_at = time.perf_counter()
        self._last_rows = len(slots)
        self._propose_s += self._left_at - started
        self._proposals += 1
        return drafts, num_drafts

    def counters(self) -> Mapping[str, float]:
        """Totals since the start; tokens drafted and accepted by source and by the least lag of each class."""
        count = self._counters
        totals = {
            "rounds": float(count[ROUNDS]),
            "drafted": float(count[DRAFTED]),
            "accepted": float(count[ACCEPTED]),
            "proposals": float(self._proposals),
            "propose_s": self._propose_s,
            "index_tokens": float(self._index.num_tokens),
            "index_bytes": float(self._index.num_bytes),
        }
        for first, names in ((BY_SOURCE, SOURCES), (BY_LAG, [f"lag{lag}" for lag in LAGS])):
            for place, name in enumerate(names):
                totals[f"drafted_{name}"] = float(count[first + 2 * place])
                totals[f"accepted_{name}"] = float(count[first + 2 * place + 1])
        return totals

    # ------------------------------------------------------------ a round

    def _play(self, slots: Array, tokens: Array, counts: Array) -> None:
        index, max_drafts = self._index, 0 if self._config.policy == "off" else self._config.max_tokens
        index.reserve(len(tokens))
        if not play(
            index.arena,
            self._running,
            slots,
            tokens,
            counts,
            self._calibration,
            self._counters,
            index.version,
            max_drafts,
        ):
            raise MemoryError("the suffix automata have outgrown their arena")
        index.num_tokens += len(tokens)

    def _shorten(self, slots: Array) -> None:
        """Drafts to what the policy allows."""
        running = self._running
        if self._config.policy == "marginal":
            allocate(
                slots, running.survival, running.weight, running.num_drafts, *self._latency.coefficients, *self._classes
            )
        else:
            np.minimum(running.num_drafts, running.budget, out=running.num_drafts)

    # ------------------------------------------------------------ requests

    def _begin(self, slot: int, problem: Problem, group: int, max_tokens: int, predicted_tokens: int) -> None:
        running = self._running
        self._problems[slot] = problem
        problem.running.add(slot)
        members = self._groups.setdefault(group, set())
        members.add(slot)
        self._group_of[slot] = group
        self._joined[group] = joined = self._joined.get(group, 0) + 1
        running.last[slot], running.bound[slot], running.length[slot] = problem.start
        running.writer[slot] = writer_of(group, joined)
        running.room[slot] = max_tokens
        running.text_length[slot] = running.num_drafts[slot] = running.barren[slot] = 0
        running.budget[slot] = logarithmic_budget(predicted_tokens, self._typical_tokens, self._config.max_tokens)
        self._counted_up_to[slot] = 0
        self._index.grew(problem, 1)
        self._match_common(slot, problem)
        self._weigh(members, joined)

    def _go_on_from(self, slot: int, problem: Problem, prompt: Array) -> None:
        """A request whose prompt is the problem's and more goes on with a text that was begun elsewhere."""
        begun = prompt[len(problem.prompt) :]
        if not len(begun) or not np.array_equal(prompt[: len(problem.prompt)], problem.prompt):
            return
        running = self._running
        running.text[slot, : len(begun)] = begun
        running.text_length[slot] = self._counted_up_to[slot] = len(begun)
        cursor = self._index.write_running(problem, begun, int(running.writer[slot]))
        running.last[slot], running.bound[slot], running.length[slot] = cursor
        self._match_common(slot, problem)

    def _match_common(self, slot: int, problem: Problem) -> None:
        """Where the request's last tokens stand in the common automaton."""
        running, common = self._running, self._index.common
        written = running.text[slot, : running.text_length[slot]]
        tail = np.concatenate([problem.prompt[-PROMPT_TAIL:], written])[-PROMPT_TAIL:]
        state, length = common.root, 0
        for token in tail.tolist():
            state, length = follow(self._index.arena, state, length, token)
        running.common[slot], running.common_length[slot] = state, length

    def _leave_group(self, slot: int) -> int:
        group = self._group_of.pop(slot)
        members = self._groups[group]
        members.discard(slot)
        if members:
            self._weigh(members, self._joined[group])
        else:
            del self._groups[group], self._joined[group]
        return group

    def _weigh(self, members: set[int], joined: int) -> None:
        """The fewer of a group still run, the more each of them holds it up."""
        weight = 1.0 + GROUP_WEIGHT * (1.0 - len(members) / joined)
        for slot in members:
            self._running.weight[slot] = weight

    def _finish(self, problem: Problem, tokens: Array, writer: int, group: int) -> None:
        index = self._index
        change = len(tokens) - self._typical_tokens
        self._typical_tokens += change * (1 - TYPICAL_KEEP if self._typical_tokens else 1.0)
        text = Text(tokens, index.version, writer, identity_of(group, tokens))
        index.keep(problem, text)
        index.share(text)
        if index.is_worn(index.common):
            index.rebuild(index.common)
            for slot, other in self._problems.items():
                self._match_common(slot, other)

    def _rebuild(self, problem: Problem) -> None:
        """Make a problem's automaton anew, the texts that are growing in it too."""
        running, index = self._running, self._index
        for slot in problem.running:
            self._account(slot, problem)
        index.rebuild(problem)
        for slot in problem.running:
            written = running.text[slot, : running.text_length[slot]]
            cursor = index.write_running(problem, written, int(running.writer[slot]))
            running.last[slot], running.bound[slot], running.length[slot] = cursor

    def _account(self, slot: int, problem: Problem) -> None:
        """Add what a running text has grown by to its problem's totals; those of the index have it already."""
        length = int(self._running.text_length[slot])
        problem.written += length - self._counted_up_to[slot]
        problem.counted += length - self._counted_up_to[slot]
        self._counted_up_to[slot] = length
