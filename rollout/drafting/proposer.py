"""The proposer that vLLM calls after every step (`method="custom_class"`). Written against vLLM 0.32.0.

vLLM gives it tokens by row and no names, so it is handed vLLM's model runner, whose `input_batch.req_ids` are in row
order. It runs between two steps of the model: what it costs is added to every step.
"""

import importlib
import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
from msgspec import Struct

from databus.codec import Array
from rollout.config import DraftConfig
from rollout.drafting.batch import Batch, Drafter
from rollout.drafting.counters import CounterPage

logger = logging.getLogger(__name__)

PROPOSER = f"{__name__}.Proposer"
DRAFTER = "rollout.drafting.drafter.Drafter"
DRAFTED_SHARE = 0.75
"""Of the tokens that one step may compute, so much may be drafts: the rest lets new requests in."""


class DraftSetup(Struct, frozen=True, kw_only=True):
    """Rollout worker -> proposer. version: that samples first. counters: path of the `CounterPage`.

    drafter: the class, by its dotted name.
    """

    config: DraftConfig
    version: int
    counters: str
    drafter: str = DRAFTER


class Proposer:
    """Drafts nothing until it is started, and nothing after its drafter has failed, until the next version."""

    def __init__(self, vllm_config: Any) -> None:
        self._max_sequences: int = vllm_config.scheduler_config.max_num_seqs
        self._max_drafted = int(DRAFTED_SHARE * vllm_config.scheduler_config.max_num_batched_tokens)
        self._context_tokens: int = vllm_config.model_config.max_model_len
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self._longest_draft: int = vllm_config.speculative_config.num_speculative_tokens
        self._runner: Any = None
        self._drafter: Drafter | None = None
        self._earlier: dict[str, float] = {}  # totals of drafters that have failed
        self._totals: dict[str, float] = {}
        self._failures = 0

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM calls it; there is no model."""

    def start(self, runner: Any, setup: DraftSetup) -> None:
        """Begin anew. Args: runner: vLLM's model runner. Raises: what the drafter's constructor raises; OSError."""
        self._runner, self._setup = runner, setup
        self._page = CounterPage.open(setup.counters)
        self._earlier, self._totals, self._failures = {}, {}, 0
        # vLLM 0.32.0 takes every proposer for a model with a context of its own: as soon as one request comes within
        # a draft of its end, it drafts token 0 for the whole batch instead of asking.
        runner.effective_drafter_max_model_len = self._context_tokens + self._longest_draft
        self._make_drafter(setup.version)
        try:
            _exercise(self._new_drafter(2))
        except Exception as error:
            self._fail(error)

    def set_version(self, version: int) -> None:
        """The policy version that samples from now on."""
        if self._runner is None:
            return
        try:
            if self._drafter is None:
                self._make_drafter(version)
            else:
                self._drafter.set_version(version)
        except Exception as error:
            self._fail(error)

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Array, token_ids_cpu: Array, **_: Any
    ) -> list[list[int]]:
        """Drafts of every row.

        Args: sampled_token_ids: R rows; empty where a prompt is not computed to its end yet. num_tokens_no_spec: [R
            or more], tokens that each row has, the sampled ones among them. token_ids_cpu: not used.
        """
        if self._drafter is not None:
            try:
                return self._propose(self._drafter, sampled_token_ids, num_tokens_no_spec)
            except Exception as error:
                self._fail(error)
        return [[] for _ in sampled_token_ids]

    def _propose(self, drafter: Drafter, sampled: list[list[int]], num_tokens: Array) -> list[list[int]]:
        batch, ids, requests = self._batch, self._runner.input_batch.req_ids, self._runner.requests
        new = batch.follow(ids, requests)
        if new:
            sampled = sampled.copy()
            for row in new:  # most have said one token; one that comes back after a preemption, more
                sampled[row] = requests[ids[row]].output_token_ids
        slots, room = batch.slots, batch.limits - num_tokens[: len(ids)] - 1
        if batch.seated is not None:
            slots, room = slots[batch.seated], room[batch.seated]
            sampled = [sampled[row] for row in batch.seated]
        tokens, counts = flatten(sampled)
        if (ends := batch.is_end[tokens]).any():
            ended = _rows_of(ends, counts)
            tokens, counts = flatten(_without_overrun(sampled, ended, batch.is_end))
            room[ended] = 0
        starts = self._runner.query_start_loc.np[: len(ids) + 1]
        decode_only = not new and bool(counts.all()) and bool(np.diff(starts).max() <= 1 + self._longest_draft)
        drafts, num_drafts = drafter.propose(
            slots, tokens, counts, decode_only=decode_only, num_scheduled_tokens=int(starts[-1])
        )
        num_drafts = _fit(np.minimum(num_drafts, room), self._max_drafted)
        self._publish()
        longest = int(num_drafts.max(initial=0))
        if not longest:
            return [[] for _ in ids]
        rows = drafts[:, :longest].tolist()
        proposed = [row[:num] if num > 0 else [] for row, num in zip(rows, num_drafts.tolist(), strict=True)]
        return proposed if batch.seated is None else _spread(proposed, batch.seated, len(ids))

    def _make_drafter(self, version: int) -> None:
        drafter = self._new_drafter(self._max_sequences)
        drafter.set_version(version)
        self._batch = Batch(drafter, self._max_sequences, self._context_tokens, self._vocab_size)
        self._drafter = drafter

    def _new_drafter(self, max_sequences: int) -> Drafter:
        module, _, name = self._setup.drafter.rpartition(".")
        make: Callable[..., Drafter] = getattr(importlib.import_module(module), name)
        return make(
            self._setup.config,
            max_sequences=max_sequences,
            vocab_size=self._vocab_size,
            context_tokens=self._context_tokens,
        )

    def _publish(self) -> None:
        assert self._drafter is not None
        totals = {"refused": float(self._batch.refused), **self._drafter.counters()}
        if self._earlier:
            totals = {field: total + self._earlier.get(field, 0.0) for field, total in totals.items()}
        totals["failures"] = float(self._failures)
        self._totals = totals
        self._page.write(totals)

    def _fail(self, error: Exception) -> None:
        """Rollouts go on; the state of a drafter that has raised is not to be relied on, so it is dropped."""
        if not self._failures:
            logger.warning("drafting has failed and pauses until the next policy version", exc_info=error)
        self._failures += 1
        self._drafter = None
        self._earlier = self._totals | {"index_tokens": 0.0, "index_bytes": 0.0}
        self._totals = self._totals | {"failures": float(self._failures)}
        self._page.write(self._totals)


def _exercise(drafter: Drafter) -> None:
    """Use a drafter that is not needed: what it compiles is there, then, before a rollout waits for it."""
    text = np.zeros(4, np.int32)
    history = [(0, 0, np.frombuffer(text.tobytes(), "<i4"))]
    slot = drafter.add(problem=1, prompt_ids=text, history=history, predicted_tokens=0, group=0, max_tokens=16)
    for tokens in (text[:1], text[:2]):
        counts = np.array([len(tokens)], np.int32)
        drafter.propose(np.array([slot], np.int32), tokens, counts, decode_only=True, num_scheduled_tokens=1)
    drafter.remove(slot)
    drafter.counters()


def flatten(sampled: list[list[int]]) -> tuple[Array, Array]:
    """Tokens of all rows, one after another, and each row's number; int32."""
    counts = np.fromiter(map(len, sampled), np.int32, len(sampled))
    return np.fromiter(chain.from_iterable(sampled), np.int32, int(counts.sum())), counts


def _rows_of(chosen: Array, counts: Array) -> list[int]:
    """Rows that have a chosen token."""
    return list(dict.fromkeys(counts.cumsum().searchsorted(chosen.nonzero()[0], side="right").tolist()))


def _without_overrun(sampled: list[list[int]], ended: list[int], is_end: Array) -> list[list[int]]:
    """vLLM's worker samples on behind an accepted end token, and its scheduler drops that later. So do we."""
    sampled = sampled.copy()
    for row in ended:
        tokens = sampled[row]
        sampled[row] = tokens[: int(is_end[tokens].argmax()) + 1]
    return sampled


def _fit(num_drafts: Array, most: int) -> Array:
    """Cut the longest drafts until all of them, and a token each, are at most `most`; int32 [R] -> [R].

    vLLM would not: it gives the first rows their drafts, and the last ones no step at all.
    """
    most -= len(num_drafts)
    if num_drafts.sum() <= most:
        return num_drafts
    longest = int(num_drafts.max())
    while longest and np.minimum(num_drafts, longest).sum() > most:
        longest -= 1
    return np.minimum(num_drafts, longest)


def _spread(proposed: list[list[int]], rows: Array, num_rows: int) -> list[list[int]]:
    """Drafts of some rows, as those of all."""
    spread: list[list[int]] = [[] for _ in range(num_rows)]
    for row, draft in zip(rows.tolist(), proposed, strict=True):
        spread[row] = draft
    return spread
