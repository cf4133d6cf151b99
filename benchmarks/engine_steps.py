"""Timed runs of the real engine with imposed lengths, and the latency of a step fitted to them."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from databus.messages import Sampling
from rollout.config import RolloutConfig
from rollout.engine.base import GenerateRequest
from rollout.engine.vllm_engine import VllmEngine

CONTEXT_TOKENS = 512
DIGITS = range(3, 12)
"""Token ids 1 to 9 of the chain-sum task; any prompt will do, since lengths are imposed."""
DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32)
PREFILL_TOKENS = (16, 400)
LONG_RUN, SHORT_RUN = 160, 40


@dataclass(frozen=True)
class StepLatency:
    """Seconds of one engine step: base_s + request_s * requests + token_s * tokens of the prompts begun in it.

    A running request costs the same for its one token in every step, so the two are one coefficient.
    """

    base_s: float
    request_s: float
    token_s: float

    def step_s(self, requests: int, prompt_tokens: int) -> float:
        return self.base_s + self.request_s * requests + self.token_s * prompt_tokens


class _Engine(VllmEngine):
    """As a worker runs it, except that every request ends at exactly its own number of tokens, by group id."""

    lengths: dict[str, int]

    async def _submit(self, request: GenerateRequest, request_id: str, sampling: Any, priority: int) -> Any:
        # Here, not in the request: the engine must not know lengths when it chooses what to begin.
        sampling.max_tokens = self.lengths.pop(request.group_id)
        return await super()._submit(request, request_id, sampling, priority)


class ImposedEngine:
    """Real vLLM whose requests have the lengths that they are given."""

    def __init__(self, model: Path, slots: int, max_tokens: int) -> None:
        """Args: max_tokens: what the engine takes for the most that a request may generate."""
        self._slots = slots
        self._max_tokens = max_tokens
        config = RolloutConfig(max_sequences=slots, context_tokens=CONTEXT_TOKENS)
        self._engine = _Engine(config, str(model), seed=0, version=0)
        self._engine.lengths = {}
        self._rng = random.Random(0)
        self._count = 0

    async def start(self) -> None:
        await self._engine.start()
        self._engine._sampling_fields |= {"stop_token_ids": [], "ignore_eos": True}
        await self.run_groups_s([[24] * self._slots] * 2, [1, 1], 2)  # warm

    async def close(self) -> None:
        await self._engine.close()

    async def run_groups_s(self, groups: Sequence[Sequence[int]], predicted: Sequence[int], credit: int) -> float:
        """Seconds until all requests of all groups are done.

        Args: groups: tokens of each request of each group, as they are leased. predicted: of each group, what the
            engine is told; all the same is first come, first served. credit: groups held at once.
        """
        room = asyncio.Semaphore(credit)
        started = time.perf_counter()

        async def run(lengths: Sequence[int], tokens: int) -> None:
            async with room:  # first come, first served
                await asyncio.gather(*(self._generate(length, tokens) for length in lengths))

        await asyncio.gather(*(run(lengths, tokens) for lengths, tokens in zip(groups, predicted, strict=True)))
        return time.perf_counter() - started

    async def _alike_s(self, count: int, tokens: int, prompt_tokens: int = 16) -> float:
        """Seconds of `count` requests at once of the same length."""
        started = time.perf_counter()
        await asyncio.gather(*(self._generate(tokens, 1, prompt_tokens) for _ in range(count)))
        return time.perf_counter() - started

    async def _generate(self, length: int, predicted: int, prompt_tokens: int = 16) -> None:
        self._count += 1
        # A prompt of its own: what the prefix cache saves is not what is measured here.
        prompt = tuple(self._rng.choice(DIGITS) for _ in range(prompt_tokens))
        request = GenerateRequest(
            group_id=f"r{self._count}",
            prompt_ids=prompt,
            group_size=1,
            sampling=Sampling(max_tokens=self._max_tokens),
            predicted_tokens=predicted,
        )
        self._engine.lengths[request.group_id] = length
        (completion,) = await self._engine.generate(request)
        assert len(completion.token_ids) == length

    async def fit(self, repeats: int) -> tuple[StepLatency, dict[str, float]]:
        """The step latency, and what it was fitted to: seconds of a step with so many requests.

        Of each run the fastest repeat counts: other work on the machine only ever adds time, and a difference of two
        medians may be anything. `fit error ratio` beside them is the largest misfit; above 0.2, measure again.
        """
        slots = self._slots
        sizes = sorted({size for size in DECODE_SIZES if size <= slots} | {slots})
        few, many = PREFILL_TOKENS
        times: dict[tuple[int, int, int], list[float]] = defaultdict(list)
        for _ in range(repeats):
            for size in sizes:  # interleaved: whatever else this machine does meets all of them
                for tokens in (LONG_RUN, SHORT_RUN):
                    times[size, tokens, few].append(await self._alike_s(size, tokens))
            for prompt_tokens in PREFILL_TOKENS:
                times[slots, 1, prompt_tokens].append(await self._alike_s(slots, 1, prompt_tokens))
        best = {run: min(seconds) for run, seconds in times.items()}
        step_s = {
            size: (best[size, LONG_RUN, few] - best[size, SHORT_RUN, few]) / (LONG_RUN - SHORT_RUN) for size in sizes
        }
        prefill_s = (best[slots, 1, many] - best[slots, 1, few]) / (slots * (many - few))
        design = np.array([[1.0, size] for size in sizes])
        weights = 1 / np.array(list(step_s.values()))  # relative errors
        solved = np.linalg.lstsq(design * weights[:, None], np.ones(len(sizes)), rcond=None)[0]
        latency = StepLatency(float(solved[0]), float(solved[1]), max(0.0, prefill_s))
        misfit = max(abs(latency.step_s(size, 0) / seconds - 1) for size, seconds in step_s.items())
        return latency, {f"{size} requests": seconds for size, seconds in step_s.items()} | {"fit error ratio": misfit}
