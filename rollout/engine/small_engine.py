"""A slow, deterministic engine on a transformers model, for tests that need no vLLM.

A group is decoded as one batch, and its noise comes from a counter-based generator keyed by (seed, cursor,
position, sample): what a group says depends neither on its neighbours, nor on when it is scheduled or how often it was
leased.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from databus.codec import Array
from databus.messages import Mismatch, Probe
from rollout.config import RolloutConfig
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
from rollout.engine.end_tokens import end_token_ids
from rollout.engine.expected import ExpectedTensors
from rollout.engine.gate import admit
from rollout.engine.served_tensors import ServedTensors
from rollout.engine.small_group import RunningGroup
from rollout.engine.tensors import DTYPES, first_mismatch, tensors

CLOSE_TIMEOUT_S = 10.0
IDLE_POLL_S = 0.5
DRAIN_POLL_S = 0.01

Command = Callable[[], None]


class SmallEngine:
    """One thread steps the groups in turn, a token each, and does everything else between two steps."""

    def __init__(self, config: RolloutConfig, model: str, seed: int, version: int) -> None:
        self._config = config
        self._model_path = model
        self._seed = seed
        self._version = version
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._groups: list[tuple[RunningGroup, Future[list[Completion]]]] = []
        self._waiting: list[tuple[RunningGroup, Future[list[Completion]]]] = []
        self._draining = False
        self._asleep = False
        self._generated = 0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="small-engine", daemon=True)

    @property
    def version(self) -> int:
        return self._version

    async def start(self) -> None:
        self._model = await asyncio.to_thread(self._load)
        self._expected = ExpectedTensors(self._model)
        self._served = ServedTensors(self._model)
        self._end_ids = await asyncio.to_thread(end_token_ids, self._model_path)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        given = len(request.prompt_ids) + len(request.prefix)
        if given >= self._config.context_tokens:
            raise EngineError(f"prompt of {given} tokens, context of {self._config.context_tokens}")
        future: Future[list[Completion]] = Future()
        group = RunningGroup(request, self._model, self._end_ids, self._seed, self._config.context_tokens)
        return await self._ask(lambda: self._begin(group, future), future)

    async def drain(self) -> None:
        if self._config.update.kv != "drain":
            return
        future: Future[None] = Future()
        await self._ask(lambda: self._stop_beginning(future), future)
        deadline = time.monotonic() + self._config.update.drain_s
        while self._groups and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        if not self._draining:
            await self.drain()
        future: Future[UpdateReport] = Future()
        return await self._ask(lambda: self._apply(snapshot, future), future)

    async def sleep(self) -> None:
        """Its memory stays where it is."""
        await self._set_asleep(True)

    async def wake(self) -> None:
        await self._set_asleep(False)

    async def _set_asleep(self, asleep: bool) -> None:
        future: Future[None] = Future()
        await self._ask(lambda: self._fall_asleep(asleep, future), future)

    def stats(self) -> EngineStats:
        running = sum(group.request.group_size for group, _ in [*self._groups, *self._waiting])
        return EngineStats(running_sequences=running, generated_tokens=self._generated)

    async def close(self) -> None:
        self._closing = True
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)

    async def _ask(self, command: Command, future: "Future[Any]") -> Any:
        if not self._thread.is_alive() or self._closing:
            raise EngineDead("the engine has stopped")
        self._commands.put(command)
        return await asyncio.wrap_future(future)  # cancelling the task cancels the future, which ends its group

    def _load(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self._model_path, dtype=DTYPES[self._config.dtype])
        return model.to(self._config.device).eval()

    # ------------------------------------------------------------ the generation thread

    def _serve(self) -> None:
        # OpenMP costs a model this small more than it brings, and ruins it on cores that others use.
        torch.set_num_threads(1)
        try:
            while not self._closing:
                self._run_commands(wait=self._asleep or not self._groups)
                for entry in list(self._groups):
                    if self._asleep:
                        break
                    self._step(*entry)
                    self._run_commands(wait=False)
        finally:
            self._closing = True
            self._run_commands(wait=False)  # so that no one waits for what will not come
            for _, future in [*self._groups, *self._waiting]:
                _settle(future, EngineDead("the engine has stopped"))

    def _run_commands(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get(block=wait, timeout=IDLE_POLL_S if wait else None)
                command()
                wait = False

    def _step(self, group: RunningGroup, future: "Future[list[Completion]]") -> None:
        outcome: list[Completion] | EngineError | None = None
        try:
            if not future.cancelled():
                self._generated += group.step(self._version)
                outcome = group.completions() if group.finished else None
        except Exception as error:
            outcome = EngineError(f"{type(error).__name__}: {error}")
        if outcome is not None or future.cancelled():
            self._groups.remove((group, future))
            _settle(future, outcome)

    def _begin(self, group: RunningGroup, future: "Future[list[Completion]]") -> None:
        (self._waiting if self._draining else self._groups).append((group, future))

    def _fall_asleep(self, asleep: bool, future: "Future[None]") -> None:
        self._asleep = asleep
        _settle(future, None)

    def _stop_beginning(self, future: "Future[None]") -> None:
        self._draining = True
        _settle(future, None)

    def _begin_again(self) -> None:
        self._draining = False
        self._groups += self._waiting
        self._waiting = []

    def _apply(self, snapshot: Snapshot, future: "Future[UpdateReport]") -> None:
        started = time.monotonic()
        try:
            mismatch = self._copy(snapshot)
        except UpdateFailed as error:
            _settle(future, error)
        except ValueError as error:
            _settle(future, UpdateFailed(f"version {snapshot.version} refused: {error}"))
        except Exception as error:  # in the middle of copying, so the weights may be a mixture
            self._closing = True
            _settle(future, EngineDead(f"loading version {snapshot.version} failed: {error}"))
        else:
            self._version = snapshot.version
            if self._config.update.kv != "keep":
                for group, _ in self._groups:
                    group.forget_cache()
            _settle(future, UpdateReport(pause_s=time.monotonic() - started, mismatch=mismatch))
        finally:
            self._begin_again()

    def _copy(self, snapshot: Snapshot) -> Mismatch | None:
        """All that can be is checked before anything is changed; the rest changes back what it finds wrong."""
        buffer = snapshot.map()
        wrong = first_mismatch(snapshot.manifest, buffer)
        if wrong:
            raise ValueError(f"tensor {wrong!r} does not match its checksum")
        self._expected.check(snapshot.manifest)
        new = dict(tensors(snapshot.manifest, buffer))
        old = self._served.read(new)
        self._served.overwrite(new)
        try:
            return self._pass(snapshot.version, snapshot.manifest.probe)
        except UpdateFailed:
            self._served.overwrite(old)
            raise

    def _pass(self, version: int, probe: Probe | None) -> Mismatch | None:
        """Raises: UpdateFailed."""
        if probe is None or not self._config.gate.is_on:
            return None
        try:
            scored = [self._logprobs(torch.tensor(ids, device=self._model.device)) for ids in probe.sequences]
            return admit(version, probe, scored, self._config.gate)
        except (ValueError, IndexError, RuntimeError) as error:
            raise UpdateFailed(f"version {version} refused: its probe cannot be scored: {error}") from error

    @torch.inference_mode()
    def _logprobs(self, token_ids: torch.Tensor) -> Array:
        logits = self._model(input_ids=token_ids[None, :-1]).logits[0].float()
        return torch.log_softmax(logits, -1).gather(-1, token_ids[1:, None])[:, 0].cpu().numpy()


def _settle(future: "Future[Any]", outcome: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
