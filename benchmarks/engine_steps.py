"""Timed runs of the real engine with imposed lengths, and the latency of a step fitted to them."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


class ImposedEngine:
    """`VllmEngine` as a worker runs it, except that every request ends at exactly its own number of tokens."""

    def __init__(self, model: Path, slots: int) -> None:
        config = RolloutConfig(max_sequences=slots, context_tokens=CONTEXT_TOKENS)
        self._engine = VllmEngine(config, str(model), seed=0, version=0)
        self._rng = random.Random(0)
        self._count = 0

    async def start(self) -> None:
        await self._engine.start()
        self._engine._sampling_fields |= {"stop_token_ids": [], "ignore_eos": True}
        await self.run_s([24] * 32, [0] * 32)  # warm

    async def close(self) -> None:
        await self._engine.close()

    async def run_s(self, lengths: Sequence[int], predicted: Sequence[int], prompt_tokens: int = 16) -> float:
        """Seconds until all requests are done, submitted in the order given.

        Args: lengths: tokens of each request. predicted: what the engine is told; all the same is first come, first
            served.
        """
        started = time.perf_counter()
        await asyncio.gather(
            *(
                self._engine.generate(self._request(length, tokens, prompt_tokens))
                for length, tokens in zip(lengths, predicted, strict=True)
            )
        )
        return time.perf_counter() - started

    def _request(self, length: int, predicted: int, prompt_tokens: int) -> GenerateRequest:
        self._count += 1
        prompt = tuple(self._rng.choice(DIGITS) for _ in range(prompt_tokens))
        # Of one's own prompt: what the prefix cache saves is not what is measured here.
        return GenerateRequest(
            group_id=f"r{self._count}",
            prompt_ids=prompt,
            group_size=1,
            sampling=Sampling(max_tokens=length),
            predicted_tokens=predicted,
        )

    async def fit(self, slots: int, repeats: int) -> tuple[StepLatency, dict[str, float]]:
        """The step latency, and what it was fitted to: seconds of a step with so many requests."""
        sizes = sorted({size for size in DECODE_SIZES if size <= slots} | {slots})
        samples: dict[int, list[float]] = {size: [] for size in sizes}
        prefill: list[float] = []
        for _ in range(repeats):
            for size in sizes:  # interleaved: whatever else this machine does meets all of them
                long_s = await self.run_s([LONG_RUN] * size, [1] * size)
                short_s = await self.run_s([SHORT_RUN] * size, [1] * size)
                samples[size].append((long_s - short_s) / (LONG_RUN - SHORT_RUN))
            few, many = PREFILL_TOKENS
            more_s = await self.run_s([1] * slots, [1] * slots, many) - await self.run_s([1] * slots, [1] * slots, few)
            prefill.append(more_s / (slots * (many - few)))
        step_s = {size: statistics.median(times) for size, times in samples.items()}
        design = np.array([[1.0, size] for size in sizes])
        weights = 1 / np.array(list(step_s.values()))  # relative errors
        solved = np.linalg.lstsq(design * weights[:, None], np.ones(len(sizes)), rcond=None)[0]
        latency = StepLatency(float(solved[0]), float(solved[1]), max(0.0, statistics.median(prefill)))
        return latency, {f"{size} requests": seconds for size, seconds in step_s.items()}
