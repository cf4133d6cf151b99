"""Drafters for tests: they propose what the test wants, and remember what they were told.

They live in the engine's own process, which imports them by name (`VllmEngine.start_drafting`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from databus.codec import Array
from rollout.config import DraftConfig

LONGEST_BEGINNING = 12


@dataclass
class Seen:
    """A request as the drafter has been told of it."""

    problem: int
    prompt_ids: list[int]
    max_tokens: int
    text: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)


class PrefixDrafter:
    """Goes on as the newest text of the problem that began as the request did; else as one that had its last token.

    It drafts as much as it may, likely or not. A finished request's text joins its problem's.
    """

    def __init__(self, config: DraftConfig, *, max_sequences: int, vocab_size: int, context_tokens: int) -> None:
        self.longest = config.max_tokens
        self.vocab_size = vocab_size
        self.begun: dict[tuple[int, ...], list[int]] = {}  # (problem, *beginning) -> how the newest text went on
        self.after: dict[tuple[int, int], list[int]] = {}  # (problem, token) -> what followed it last
        self.seen: dict[int, Seen] = {}
        self.free = list(range(max_sequences))
        self.versions: list[int] = []
        self.totals = dict.fromkeys(("rounds", "drafted", "accepted", "proposals", "propose_s"), 0.0)

    def add(
        self,
        *,
        problem: int,
        prompt_ids: Array,
        history: Sequence[tuple[int, int, Array]],
        predicted_tokens: int,
        group: int,
        max_tokens: int,
        end_tokens: Sequence[int] = (),
    ) -> int:
        if any(((tokens < 0) | (tokens >= self.vocab_size)).any() for *_, tokens in history):
            raise ValueError("a token id outside of the vocabulary")
        for *_, tokens in history:
            self._keep(problem, tokens.tolist())
        slot = self.free.pop()
        self.seen[slot] = Seen(problem, prompt_ids.tolist(), max_tokens)
        return slot

    def remove(self, slot: int) -> None:
        ended = self.seen.pop(slot)
        self._keep(ended.problem, ended.text)
        self.free.append(slot)

    def set_version(self, version: int) -> None:
        self.versions.append(version)

    def propose(
        self, slots: Array, tokens: Array, counts: Array, *, decode_only: bool, num_scheduled_tokens: int
    ) -> tuple[Array, Array]:
        drafts = np.zeros((len(slots), self.longest), np.int32)
        num_drafts = np.zeros(len(slots), np.int32)
        rows = np.split(tokens, np.cumsum(counts)[:-1]) if len(slots) else []
        for row, (slot, new) in enumerate(zip(slots.tolist(), rows, strict=True)):
            seen = self.seen[slot]
            if not len(new):
                continue
            self._judge(seen, new.tolist())
            seen.text += new.tolist()
            draft = self._draft(seen)[: self.longest]
            seen.drafted = draft
            drafts[row, : len(draft)] = draft
            num_drafts[row] = len(draft)
        self.totals["drafted"] += float(num_drafts.sum())
        self.totals["proposals"] += 1
        return drafts, num_drafts

    def counters(self) -> Mapping[str, float]:
        return self.totals

    def _judge(self, seen: Seen, new: list[int]) -> None:
        if seen.drafted:
            self.totals["rounds"] += 1
            self.totals["accepted"] += len(new) - 1

    def _draft(self, seen: Seen) -> list[int]:
        begun = self.begun.get((seen.problem, *seen.text))
        last = seen.text[-1]
        guess = [(last + 1 + place) % self.vocab_size for place in range(self.longest)]
        return begun or self.after.get((seen.problem, last), guess)

    def _keep(self, problem: int, text: list[int]) -> None:
        for place in range(1, len(text)):
            rest = text[place : place + self.longest]
            self.after[problem, text[place - 1]] = rest
            if place <= LONGEST_BEGINNING:
                self.begun[(problem, *text[:place])] = rest


class DefectDrafter(PrefixDrafter):
    """Puts vLLM 0.32.0's own kernel back in place of the mended one."""

    def __init__(self, config: DraftConfig, *, max_sequences: int, vocab_size: int, context_tokens: int) -> None:
        from vllm.utils.cpu_triton_utils import _expand_kernel_impl
        from vllm.v1.sample import rejection_sampler

        super().__init__(config, max_sequences=max_sequences, vocab_size=vocab_size, context_tokens=context_tokens)
        kernel: Any = rejection_sampler.expand_kernel
        kernel._impl = _expand_kernel_impl


class RaisingDrafter(PrefixDrafter):
    """Drafts ten times, then raises."""

    def propose(
        self, slots: Array, tokens: Array, counts: Array, *, decode_only: bool, num_scheduled_tokens: int
    ) -> tuple[Array, Array]:
        if self.totals["proposals"] == 10:
            raise RuntimeError("a drafter that raises")
        return super().propose(
            slots, tokens, counts, decode_only=decode_only, num_scheduled_tokens=num_scheduled_tokens
        )
