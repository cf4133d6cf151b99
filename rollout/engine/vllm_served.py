"""The engine of a rollout worker with a second door, by which vLLM's own API server comes in. For vLLM 0.32.0.

Both doors lead to one AsyncLLM: what comes through the second shares steps, drafts and updates with our own groups.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from rollout.drafting.facts import EXTRA_ARGUMENT
from rollout.engine.vllm_engine import VllmEngine
from rollout.engine.vllm_setup import PROBE_ARGUMENT

OWN_ARGUMENTS = frozenset((EXTRA_ARGUMENT, PROBE_ARGUMENT))


class RequestRefused(ValueError):
    """What somebody asked for cannot be served; vLLM's API server answers 400 with its text."""


class ServedEngine(VllmEngine):
    """Text goes in and out as well as token ids, and there are vLLM's own metrics."""

    def _arguments(self) -> Any:
        return dataclasses.replace(super()._arguments(), skip_tokenizer_init=False, disable_log_stats=False)

    def client(self) -> "PublicClient":
        """For vLLM's API server, once the engine has started."""
        return PublicClient(self, self._llm)

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""
        return self._llm.get_tokenizer()

    @property
    def vocab_size(self) -> int:
        """Of the model, which may have more entries than its tokenizer."""
        return self._llm.model_config.get_vocab_size()

    async def stream(self, prompt: Any, sampling: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        """vLLM's `generate`, through updates of the weights: a request without a token begins anew after one.

        Of a request with several samples it is not known whether all of them have begun: they keep their cache.
        """
        sampling, is_whole = self._public_sampling(sampling)
        more["priority"] = self._begin_order.priority(0, sampling.max_tokens or self._config.context_tokens)
        while True:
            outputs = await self._enter(prompt, sampling, request_id, more)
            try:
                while True:
                    output = outputs.get_nowait() or await outputs.get()
                    if self._was_put_back(output, request_id):
                        break
                    self._without_token.discard(request_id)
                    if output.finished or not is_whole:
                        yield output
                    if output.finished:
                        return
            except (asyncio.CancelledError, GeneratorExit):  # its client has gone
                await self._llm.abort(outputs.request_id, internal=True)
                raise
            finally:
                outputs.close()
                self._in_flight.discard(request_id)
                self._without_token.discard(request_id)

    async def _enter(self, prompt: Any, sampling: Any, request_id: str, more: dict[str, Any]) -> Any:
        """What vLLM's `generate` reads from. Raises: EngineDead, and what vLLM raises."""
        async with self._door.passing():
            if self._dead is not None:
                raise self._dead
            own, given = self._cache_salt(), prompt.get("cache_salt")
            salted = {**prompt, "cache_salt": own if given is None else f"{own}, {given}"}
            outputs = await self._llm.add_request(request_id, salted, sampling, **more)
            self._in_flight.add(request_id)
            if sampling.n == 1:
                self._without_token.add(request_id)
            return outputs

    def _public_sampling(self, sampling: Any) -> tuple[Any, bool]:
        """(sampling parameters; is only the last output wanted). Raises: RequestRefused."""
        from vllm.sampling_params import RequestOutputKind

        if sampling.seed is not None and self._config.device == "cpu":
            # vLLM 0.32.0: "CPU Generator does not use offset" ends the engine's process, for everybody.
            raise RequestRefused("seed is not supported where vLLM runs on a CPU")
        if OWN_ARGUMENTS & (sampling.extra_args or {}).keys():
            raise RequestRefused(f"vllm_xargs: {', '.join(sorted(OWN_ARGUMENTS))} are not for requests")
        if sampling.n != 1 or sampling.output_kind != RequestOutputKind.FINAL_ONLY:
            return sampling, False
        # As our own requests: an output at the first token, so that we know it has begun, and the last.
        sampling = sampling.clone()
        sampling.output_kind = RequestOutputKind.CUMULATIVE
        sampling.stream_interval = self._config.context_tokens + 1
        return sampling, True

    def _was_put_back(self, output: Any, request_id: str) -> bool:
        """By `update`, which has told vLLM to drop it: a request that its own client drops is cancelled instead."""
        return output.finished and request_id in self._without_token and output.outputs[0].finish_reason == "abort"


class PublicClient:
    """In place of AsyncLLM, which does all but `generate`."""

    def __init__(self, engine: ServedEngine, llm: Any) -> None:
        self._llm = llm
        self.generate = engine.stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
