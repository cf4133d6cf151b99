"""vLLM behind the `Engine` protocol. Written against vLLM 0.32.0.

In-flight updates. What becomes of requests that have a token is `rollout.update.kv`: they keep their KV cache, or have
it computed anew, or end before the update. Those that have none yet are submitted anew, and the prefix cache is keyed
by version. So the KV cache that a completion starts from is always of the version that sampled its first token, and a
completion whose tokens all carry one version was computed with that version's weights alone. While the mismatch gate
scores a version, nothing but its probes is computed (`vllm_scheduler`): what a refused version would have said is in no
request's cache.
"""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Awaitable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from rollout.config import DraftConfig, RolloutConfig
from rollout.drafting.counters import CounterPage
from rollout.drafting.facts import DraftFacts, group_key, problem_key
from rollout.drafting.proposer import DRAFTER, DraftSetup
from rollout.engine.all_or_none import all_or_none
from rollout.engine.base import (
    Completion,
    EngineDead,
    EngineError,
    EngineStats,
    GenerateRequest,
    Snapshot,
    UpdateFailed,
    UpdateReport,
)
from rollout.engine.begin_order import BEGUN, BeginOrder
from rollout.engine.door import Door
from rollout.engine.end_tokens import end_token_ids
from rollout.engine.expected import ExpectedTensors
from rollout.engine.vllm_gate import PROBE_SAMPLING, VllmGate
from rollout.engine.vllm_setup import (
    check_installed,
    engine_arguments,
    leaves_memory,
    set_environment,
    tied_engine_cores,
)
from rollout.engine.vllm_update import VllmUpdate

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 10.0
DRAIN_POLL_S = 0.01
START_POLL_S = 0.05
CORE_NAME = "EngineCore"
MAX_ERROR_CHARACTERS = 400

T = TypeVar("T")


class VllmEngine:
    """One AsyncLLM. Every completion of a group is a request of its own, `group_id:s0` and so on."""

    def __init__(
        self,
        config: RolloutConfig,
        model: str,
        seed: int,
        version: int,
        draft: DraftConfig = DraftConfig(),  # noqa: B008
        turns: Path | None = None,
    ) -> None:
        """Args: turns: folder of the flags by which its own processes say that they have the device; None where it has
        one of its own, and `sleep` is not called."""
        self._config = config
        self._turns = turns
        self._draft = draft
        self._draft_page: CounterPage | None = None
        self._model = model
        self._seed = seed
        self._version = version
        self._updates = 0
        self._llm: Any = None
        self._door = Door()  # shut while weights are being loaded
        self._dead: EngineDead | None = None
        self._in_flight: set[str] = set()
        self._without_token: set[str] = set()
        self._running = 0
        self._generated = 0
        self._begin_order = BeginOrder(config.max_sequences)
        # The kernel ends a child that asked for it when the *thread* that made it ends: this one stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="vllm-start")
        self._starting: Future[None] | None = None
        self._closed = False
        self._others = frozenset[BaseProcess]()  # engine cores of this process that another engine has started

    @property
    def version(self) -> int:
        return self._version

    @property
    def is_dead(self) -> bool:
        """Has a process of the engine ended that should not have?"""
        return self._llm is not None and self._llm.errored

    async def start(self) -> None:
        set_environment(self._config, self._model)
        self._starting = self._starter.submit(self._build)
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._starting), self._config.start_timeout_s)
        except TimeoutError:
            raise EngineDead(f"vLLM did not start within {self._config.start_timeout_s:g} s") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"vLLM cannot serve {self._model!r}: {_one_line(error)}") from error
        except RuntimeError as error:
            raise EngineDead(f"vLLM did not start: {_one_line(error)}") from error
        await self._call(self._llm.collective_rpc("echelon_set_up_process"))
        await self._call(self._llm.update_weight_version(str(self._version)))
        if self._draft.policy != "off":
            await self.start_drafting()
        await self._say_turn(True)
        self._door.open()

    async def start_drafting(self, drafter: str = DRAFTER) -> None:
        """Draft with an empty memory from here on. Args: drafter: the class, by its dotted name. Raises: EngineDead."""
        page = CounterPage.create()
        setup = DraftSetup(config=self._draft, version=self._version, counters=page.path, drafter=drafter)
        await self._call(self._llm.collective_rpc("echelon_start_drafting", args=(msgspec.msgpack.encode(setup),)))
        self._close_page()
        self._draft_page = page

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        return await all_or_none(self._complete(request, index) for index in range(request.group_size))

    async def drain(self) -> None:
        if self._config.update.kv != "drain":
            return
        await self._call(self._door.shut())
        await self._call(self._llm.abort(sorted(self._without_token)))
        deadline = time.monotonic() + self._config.update.drain_s
        while self._in_flight and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        try:
            await self._update.check(snapshot)
            if self._door.is_open:  # not drained yet
                await self.drain()
            await self._call(self._door.shut())
            return await self._switch(snapshot)
        except UpdateFailed:
            raise
        except BaseException as error:  # which weights there are nobody knows: nothing more is generated with them
            self._dead = error if isinstance(error, EngineDead) else EngineDead("an update was broken off")
            raise
        finally:
            self._door.open()

    async def _switch(self, snapshot: Snapshot) -> UpdateReport:
        kv, left = self._config.update.kv, len(self._in_flight)
        if kv == "drain" and left:
            logger.warning("%d requests did not end within rollout.update.drain_s; they are recomputed", left)

        def switched() -> None:
            self._version = snapshot.version
            self._updates += 1

        return await self._update.apply(
            snapshot, self._version, begin_anew=self._without_token, recompute=kv != "keep", switched=switched
        )

    async def sleep(self) -> None:
        """On the CPU, where vLLM cannot sleep, it only pauses. Asleep it has weights in host memory and no KV cache:
        requests in flight keep their tokens, and have their cache computed anew."""
        if self._leaves_memory:
            await self._call(self._llm.sleep(level=1, mode="keep"))
        else:
            await self._call(self._llm.pause_generation(mode="keep", clear_cache=False))
        await self._say_turn(False)

    async def wake(self) -> None:
        await self._say_turn(True)
        if not self._leaves_memory:
            await self._call(self._llm.resume_generation())
        elif not await self._call(self._llm.wake_up()):
            raise EngineDead("vLLM did not wake up whole")

    @property
    def _leaves_memory(self) -> bool:
        return leaves_memory(self._config, self._turns is not None)

    async def _say_turn(self, mine: bool) -> None:
        """vLLM's processes have the device, and may outlive this one for a moment: they have flags of their own."""
        if self._turns is not None:
            await self._call(self._llm.collective_rpc("echelon_turn", args=(str(self._turns), mine)))

    def stats(self) -> EngineStats:
        drafting = self._draft_page.read() if self._draft_page else {}
        return EngineStats(
            running_sequences=self._running,
            generated_tokens=self._generated,
            drafting=drafting,
        )

    async def close(self) -> None:
        self._closed = True
        if self._llm is not None:
            self._llm.shutdown(timeout=STOP_TIMEOUT_S)
            self._llm = None  # or its finalizer runs when the interpreter has half gone
        await asyncio.to_thread(self._end_cores)
        self._starter.shutdown(wait=False)
        self._close_page()

    def _end_cores(self) -> None:
        """Also those that a start which nobody waits for any more has yet to make."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        _end(_engine_cores() - self._others)
        while self._starting is not None and not self._starting.done() and time.monotonic() < deadline:
            time.sleep(START_POLL_S)
            _end(_engine_cores() - self._others)

    def _close_page(self) -> None:
        if self._draft_page is not None:
            self._draft_page.close()

    def _build(self) -> None:
        self._others = _engine_cores()
        check_installed(self._config.device)
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.async_llm import AsyncLLM

        expected = ExpectedTensors.of(self._model)
        self._sampling_fields = {
            "stop_token_ids": end_token_ids(self._model),
            "logprobs": 0,  # the sampled token's alone
            "flat_logprobs": True,
            "detokenize": False,
            # Two outputs a request: one at its first token, so that we know it has begun, and the last.
            "output_kind": RequestOutputKind.CUMULATIVE,
            "stream_interval": self._config.context_tokens + 1,
        }
        self._sampling_type = SamplingParams
        self._tokens_input = tokens_input
        if self._closed:
            raise EngineDead("closed while it was starting")
        with tied_engine_cores():
            self._llm = AsyncLLM.from_engine_args(self._arguments())
        gate = VllmGate(
            self._config.gate,
            self._llm,
            sampling=SamplingParams(**PROBE_SAMPLING),
            tokens_input=tokens_input,
            translate=self._translate,
        )
        self._update = VllmUpdate(self._llm, expected, gate, self._call)

    def _arguments(self) -> Any:
        return engine_arguments(self._config, self._model, self._seed, self._draft, self._turns is not None)

    def _cache_salt(self) -> str:
        """Keeps the prefix cache of these weights apart from that of all others, whatever their version is called."""
        return f"weights {self._updates}"

    async def _complete(self, request: GenerateRequest, index: int) -> Completion:
        given = len(request.prompt_ids) + len(request.prefix)
        room = self._config.context_tokens - given
        if room < 1:
            raise EngineError(f"prompt of {given} tokens, context of {self._config.context_tokens}")
        sampling = self._sampling_type(
            max_tokens=min(request.sampling.max_tokens, room),
            temperature=request.sampling.temperature,
            extra_args=self._extra_arguments(request, index),
            **self._sampling_fields,
        )
        priority = BEGUN
        if not request.prefix:
            priority = self._begin_order.priority(request.predicted_tokens, request.sampling.max_tokens)
        self._running += 1
        try:
            while True:
                request_id = f"{request.group_id}:s{request.first_sample + index}"
                output = await self._submit(request, request_id, sampling, priority)
                if output.finish_reason != "abort":  # by an update: it had no token yet
                    break
        finally:
            self._running -= 1
        self._generated += len(output.token_ids)
        return _completion(output)

    def _extra_arguments(self, request: GenerateRequest, index: int) -> dict[str, Any] | None:
        """For the proposer. The history rides with the first of the group, which vLLM takes up first."""
        if self._draft.policy == "off":
            return None
        facts = DraftFacts(
            problem=request.problem or problem_key(np.array(request.prompt_ids, np.int32)),
            group=group_key(request.group_id),
            predicted_tokens=request.predicted_tokens,
            history=_encoded_history(request) if index == 0 and not request.prefix else (),
            end_tokens=tuple(self._sampling_fields["stop_token_ids"]),
        )
        return facts.extra_arguments()

    async def _submit(self, request: GenerateRequest, request_id: str, sampling: Any, priority: int) -> Any:
        try:
            async with self._door.passing():
                if self._dead is not None:
                    raise self._dead
                self._in_flight.add(request_id)
                self._without_token.add(request_id)
                prompt = self._tokens_input([*request.prompt_ids, *request.prefix], cache_salt=self._cache_salt())
                outputs = await self._llm.add_request(request_id, prompt, sampling, priority=priority)
            return await self._last_of(outputs, request_id)
        except EngineDead:
            raise
        except Exception as error:
            raise self._translate(error) from error
        except asyncio.CancelledError:
            if self._llm is not None:
                await self._llm.abort(request_id)
            raise
        finally:
            self._in_flight.discard(request_id)
            self._without_token.discard(request_id)

    async def _last_of(self, outputs: Any, request_id: str) -> Any:
        while True:
            output = outputs.get_nowait() or await outputs.get()
            self._without_token.discard(request_id)
            if output.finished:
                return output.outputs[0]

    async def _call(self, call: Awaitable[T]) -> T:
        """A call to the engine core that must succeed: without its answer nobody knows what is being served."""
        try:
            return await asyncio.wait_for(call, CALL_TIMEOUT_S)
        except TimeoutError:
            raise EngineDead(f"vLLM did not answer within {CALL_TIMEOUT_S:g} s") from None
        except Exception as error:
            raise EngineDead(f"vLLM failed: {_one_line(error)}") from error

    def _translate(self, error: Exception) -> EngineError:
        if self._llm.errored:
            return EngineDead("vLLM's engine process has died; see this role's log")
        return EngineError(f"vLLM refused a request: {_one_line(error)}")


def _encoded_history(request: GenerateRequest) -> tuple[tuple[int, int, bytes], ...]:
    identities = request.history_ids or (0,) * len(request.history)
    return tuple(
        (version, identity, np.ascontiguousarray(token_ids, "<i4").tobytes())
        for (version, token_ids), identity in zip(request.history, identities, strict=True)
    )


def _completion(output: Any) -> Completion:
    token_ids = np.array(output.token_ids, np.int32)
    versions = np.full(len(token_ids), -1, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    logprobs = np.array(output.logprobs.logprobs, np.float32)
    if (versions < 0).any() or len(logprobs) != len(token_ids):
        raise EngineError("vLLM gave tokens without a version or a log-probability")
    return Completion(
        token_ids=token_ids, logprobs=logprobs, versions=versions, truncated=output.finish_reason == "length"
    )


def _engine_cores() -> frozenset[BaseProcess]:
    return frozenset(child for child in multiprocessing.active_children() if child.name.startswith(CORE_NAME))


def _end(cores: Collection[BaseProcess]) -> None:
    """End engine cores, answering or not; their own workers end with them."""
    for core in cores:
        core.kill()
    for core in cores:
        core.join(CLOSE_TIMEOUT_S)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_ERROR_CHARACTERS] or type(error).__name__
