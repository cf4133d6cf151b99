"""Budgeted reasoning: thinking and solution have budgets of their own, over any engine.

    prompt │ thinking … end │ solution … end of text
           │ ≤ thinking     │ ≤ solution

A completion is generated as far as the thinking budget goes. If thinking has not ended by then, its end is forced;
then the solution goes on in a second request, which finds its prefix in the engine's cache. Two requests instead of a
logits processor, because vLLM's do not combine with speculation; each completion for itself, because a sibling that
thinks long must not hold up the others.

Source: Elastic Reasoning (arXiv:2505.05315), separate budgeting.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from rollout.config import ReasoningConfig, RolloutConfig
from rollout.engine.all_or_none import all_or_none
from rollout.engine.base import Completion, Engine, EngineStats, GenerateRequest, Snapshot, UpdateReport
from rollout.engine.end_tag import EndTag, load_end_tag


class ReasoningEngine:
    """An engine whose completions keep to `RolloutConfig.reasoning`; all but `generate` is the inner engine's."""

    def __init__(
        self,
        engine: Engine,
        config: RolloutConfig,
        model: str,
        load_tag: Callable[[str, str], EndTag] = load_end_tag,
    ) -> None:
        self._engine = engine
        self._config = config
        self._budgets = config.reasoning
        self._model = model
        self._load_tag = load_tag

    @property
    def version(self) -> int:
        return self._engine.version

    async def start(self) -> None:
        """Raises: ValueError, too, where `max_tokens` has no room for the budgets."""
        self._tag = await asyncio.to_thread(self._load_tag, self._model, self._budgets.end)
        check_budgets(self._budgets, len(self._tag), "rollout.max_tokens", self._config.max_tokens)
        await self._engine.start()

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        return await all_or_none(self._complete(request, index) for index in range(request.group_size))

    async def drain(self) -> None:
        await self._engine.drain()

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        return await self._engine.update(snapshot)

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def close(self) -> None:
        await self._engine.close()

    # ------------------------------------------------------------ one completion

    async def _complete(self, request: GenerateRequest, index: int) -> Completion:
        alone = replace(request, group_size=1, first_sample=request.first_sample + index)
        limit = min(self._room(request), request.sampling.max_tokens)
        thought = await self._ask(alone, self._thinking_budget(limit))
        end = self._tag.find(thought.token_ids)
        if end is not None and len(thought.token_ids) - end > self._budgets.solution_tokens:
            return cut(thought, end + self._budgets.solution_tokens)
        if not thought.truncated:
            return thought  # it has ended by itself, with a solution or without having thought
        begun = thought if end is not None else join(thought, self._forced(thought))
        solution_tokens = 0 if end is None else len(thought.token_ids) - end
        left = min(self._budgets.solution_tokens - solution_tokens, limit - len(begun.token_ids))
        if left < 1:
            return thought
        prefix = (*request.prefix, *begun.token_ids.tolist())
        return join(begun, await self._ask(replace(alone, prefix=prefix), left))

    async def _ask(self, request: GenerateRequest, max_tokens: int) -> Completion:
        sampling = msgspec.structs.replace(request.sampling, max_tokens=max_tokens)
        (completion,) = await self._engine.generate(replace(request, sampling=sampling))
        return completion

    def _thinking_budget(self, limit: int) -> int:
        """Less than was set where a long prompt leaves too little room: the solution's share comes first."""
        spare = limit - len(self._tag) - self._budgets.solution_tokens
        return max(1, min(self._budgets.thinking_tokens, spare))

    def _room(self, request: GenerateRequest) -> int:
        return self._config.context_tokens - len(request.prompt_ids) - len(request.prefix)

    def _forced(self, thought: Completion) -> Completion:
        """The end of thinking, or what is missing of it, as far as there is none in `thought`."""
        token_ids = self._tag.missing(thought.token_ids)
        return Completion(
            token_ids=token_ids,
            logprobs=np.zeros(len(token_ids), np.float32),
            versions=np.full(len(token_ids), self._engine.version, np.int32),
            truncated=True,
            loss_mask=np.zeros(len(token_ids), np.uint8),
        )


def check_budgets(budgets: ReasoningConfig, tag_tokens: int, key: str, max_tokens: int) -> None:
    """Raises: ValueError, in one line, where `max_tokens`, the setting `key`, has no room for all the budgets."""
    needed = budgets.thinking_tokens + tag_tokens + budgets.solution_tokens
    if budgets.thinking_tokens and max_tokens < needed:
        raise ValueError(
            f"{key} is {max_tokens}, but thinking ({budgets.thinking_tokens}), its end {budgets.end!r} ({tag_tokens}) "
            f"and the solution ({budgets.solution_tokens}) take {needed} tokens: raise it, or lower "
            "rollout.reasoning.thinking_tokens or solution_tokens"
        )


def cut(completion: Completion, length: int) -> Completion:
    """Its first `length` tokens: truncated, as it has more."""
    assert length < len(completion.token_ids)
    mask = completion.loss_mask
    return Completion(
        token_ids=completion.token_ids[:length],
        logprobs=completion.logprobs[:length],
        versions=completion.versions[:length],
        truncated=True,
        loss_mask=None if mask is None else mask[:length],
    )


def join(first: Completion, second: Completion) -> Completion:
    """One after the other; whether it is truncated is the second's to say."""
    mask = np.concatenate((first.sampled(), second.sampled()))
    return Completion(
        token_ids=np.concatenate((first.token_ids, second.token_ids)),
        logprobs=np.concatenate((first.logprobs, second.logprobs)),
        versions=np.concatenate((first.versions, second.versions)),
        truncated=second.truncated,
        loss_mask=None if mask.all() else mask,
    )
