"""The mismatch gate on vLLM: probes through a pause."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from databus.codec import Array
from databus.messages import Mismatch, Probe
from rollout.config import GateConfig
from rollout.engine.all_or_none import all_or_none
from rollout.engine.base import EngineDead, EngineError, UpdateFailed
from rollout.engine.gate import admit
from rollout.engine.vllm_setup import PROBE_ARGUMENT

PROBE_TIMEOUT_S = 120.0
PROBE_SAMPLING: Mapping[str, Any] = {
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,  # each token's own
    "flat_logprobs": True,
    "detokenize": False,
    "extra_args": {PROBE_ARGUMENT: True},
}


class VllmGate:
    """Of one AsyncLLM, which `vllm_scheduler` schedules."""

    def __init__(
        self,
        config: GateConfig,
        llm: Any,
        *,
        sampling: Any,
        tokens_input: Callable[..., Any],
        translate: Callable[[Exception], EngineError],
    ) -> None:
        """Args: sampling: vLLM's `SamplingParams` with `PROBE_SAMPLING`. tokens_input: vLLM's. translate: what vLLM
        raised to what an engine raises."""
        self._config = config
        self._llm = llm
        self._sampling = sampling
        self._tokens_input = tokens_input
        self._translate = translate

    async def admit(self, version: int, probe: Probe | None) -> Mismatch | None:
        """Let weights pass that are loaded and not served yet; call it in a pause. Raises: UpdateFailed; EngineDead."""
        if probe is None or not self._config.is_on:
            return None
        texts = (self._score(f"probe{version}:{index}", ids) for index, ids in enumerate(probe.sequences))
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return admit(version, probe, await all_or_none(texts), self._config)
        except (EngineDead, UpdateFailed):
            raise
        except (EngineError, ValueError, TimeoutError) as error:
            why = str(error) or f"no answer within {PROBE_TIMEOUT_S:g} s"
            raise UpdateFailed(f"version {version} refused: its probe cannot be scored: {why}") from error

    async def _score(self, request_id: str, token_ids: Sequence[int]) -> Array:
        """Log-probabilities of all tokens but the first, float32 [t - 1], at temperature 1. Raises: EngineError."""
        prompt, logprobs = self._tokens_input(list(token_ids), cache_salt=request_id), None
        try:
            async for output in self._llm.generate(prompt, self._sampling, request_id):
                logprobs = output.prompt_logprobs
        except Exception as error:
            raise self._translate(error) from error
        if logprobs is None:
            raise EngineError("vLLM gave no log-probabilities of a prompt")
        return np.array(logprobs.logprobs, np.float32)
