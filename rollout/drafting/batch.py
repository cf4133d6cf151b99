"""vLLM's running batch as the drafter sees it: which of the drafter's slots each row has."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from databus.codec import Array
from rollout.drafting.facts import DraftFacts, read_facts

logger = logging.getLogger(__name__)

NO_SLOT = -1


class Drafter(Protocol):
    """Drafts for many requests at once; `rollout.drafting.drafter.Drafter` is one. K: most tokens a draft."""

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
        """A request begins. Returns: its slot. Raises: ValueError for what it cannot take."""
        ...

    def remove(self, slot: int) -> None: ...

    def set_version(self, version: int) -> None: ...

    def propose(
        self, slots: Array, tokens: Array, counts: Array, *, decode_only: bool, num_scheduled_tokens: int
    ) -> tuple[Array, Array]:
        """int32 [R], [sum of counts], [R] -> drafts int32 [R, K] and their numbers int32 [R]."""
        ...

    def counters(self) -> Mapping[str, float]: ...


class Batch:
    """R rows. slots: int32 [R]. limits: int32 [R], tokens that a row may ever have, its prompt among them.

    is_end: bool [V], tokens that end a completion, of any request so far: an engine's requests share them.
    """

    def __init__(self, drafter: Drafter, max_sequences: int, context_tokens: int, vocab_size: int) -> None:
        self._drafter = drafter
        self._capacity = max_sequences
        self._context_tokens = context_tokens
        self._ids: list[str] = []
        self._seats: dict[str, tuple[int, int]] = {}  # (slot, limit) of every request that vLLM has not ended
        self._warned = False
        self.refused = 0
        self.slots = np.empty(0, np.int32)
        self.limits = np.empty(0, np.int32)
        self.is_end = np.zeros(vocab_size, bool)
        self.seated: Array | None = None
        """Rows that have a slot; None: all of them."""

    def follow(self, ids: list[str], requests: Mapping[str, Any]) -> list[int]:
        """Learn which requests the batch holds now.

        Args: ids: their names, row by row. requests: vLLM's states of all that it has not ended, waiting or not.
        Returns: the rows that are new to the drafter, which must be given all that they have said so far.
        """
        if ids == self._ids:
            return []
        for gone in self._seats.keys() - requests.keys():
            self._remove(gone)
        new = [row for row, name in enumerate(ids) if name not in self._seats]
        self._make_room(len(new), ids)
        for row in new:
            self._seats[ids[row]] = self._add(requests[ids[row]])
        self._ids = ids.copy()
        seats = np.array([self._seats[name] for name in ids], np.int32).reshape(-1, 2)
        self.slots, self.limits = seats[:, 0].copy(), seats[:, 1].copy()
        self.seated = None if (self.slots >= 0).all() else np.flatnonzero(self.slots >= 0)
        return new

    def _make_room(self, needed: int, ids: list[str]) -> None:
        """Requests that were preempted keep their slot unless others need it; they begin anew when they come back."""
        if len(self._seats) + needed > self._capacity:
            for waiting in self._seats.keys() - set(ids):
                self._remove(waiting)

    def _remove(self, name: str) -> None:
        slot, _ = self._seats.pop(name)
        if slot != NO_SLOT:
            self._drafter.remove(slot)

    def _add(self, request: Any) -> tuple[int, int]:
        """What the drafter cannot take is left out: the history, or else the request."""
        prompt_ids = np.array(request.prompt_token_ids, np.int32)
        room = min(request.sampling_params.max_tokens, self._context_tokens - len(prompt_ids))
        limit = len(prompt_ids) + room
        ends = request.sampling_params.stop_token_ids or ()
        self.is_end[[token for token in ends if 0 <= token < len(self.is_end)]] = True
        try:
            facts = read_facts(request.sampling_params.extra_args, prompt_ids)
        except ValueError as error:
            self._refuse(error)
            facts = read_facts(None, prompt_ids)
        for history in (facts.history, ()):
            try:
                return self._add_with(facts, history, prompt_ids, room), limit
            except ValueError as error:
                self._refuse(error)
                if not history:
                    break
        return NO_SLOT, limit

    def _add_with(
        self, facts: DraftFacts, history: tuple[tuple[int, int, bytes], ...], prompt_ids: Array, room: int
    ) -> int:
        return self._drafter.add(
            problem=facts.problem,
            prompt_ids=prompt_ids,
            history=[(version, identity, np.frombuffer(tokens, "<i4")) for version, identity, tokens in history],
            predicted_tokens=facts.predicted_tokens,
            group=facts.group,
            max_tokens=room,
            end_tokens=facts.end_tokens,
        )

    def _refuse(self, error: ValueError) -> None:
        self.refused += 1
        if not self._warned:
            logger.warning("the drafter refused a request or its history, which goes on without: %s", error)
            self._warned = True
