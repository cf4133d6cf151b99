"""One call a step from vLLM's engine core to its worker, where vLLM makes two, and three with drafts; and neither
keeps a core busy while it waits for the other.

On the CPU the two are processes, and each call waits for the other to wake up: a few per cent of a step of a small
model. Written against vLLM 0.32.0, which takes an executor's name (`distributed_executor_backend`).
"""

import time
from concurrent.futures import Future
from typing import Any

import vllm.envs
from vllm.distributed.device_communicators import shm_broadcast
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

STEP = "echelon_step"
WAIT_IN_NAPS = "echelon_wait_in_naps"
"""Methods of the worker's, of `rollout.engine.vllm_worker.SnapshotLoader`."""
NAP_S = 50e-6
"""Linux adds as much again by itself (timer slack)."""
LONGEST_NAP_S = 1e-3
LATE = 1 / 8


class OneCallExecutor(MultiprocExecutor):
    """A step's drafts come with its tokens, and wait here until the engine core asks for them."""

    _drafts: Any = None
    _drafts_wait = False

    def _init_executor(self) -> None:
        super()._init_executor()
        wait_in_naps()
        self.collective_rpc(WAIT_IN_NAPS)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Sampling included, unless a grammar is to be applied between the two."""
        self._drafts_wait = not scheduler_output.has_structured_output_requests
        if not self._drafts_wait:
            return super().execute_model(scheduler_output, non_block)
        answer = self.collective_rpc(
            STEP,
            args=(scheduler_output,),
            unique_reply_rank=self.output_rank,
            non_block=True,
            timeout=vllm.envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
        )
        step = _Step(self, answer)
        return step if non_block else step.result()

    def take_draft_token_ids(self) -> Any:
        if not self._drafts_wait:
            return super().take_draft_token_ids()
        drafts, self._drafts = self._drafts, None
        return drafts


class _Step(Future):
    """A step's tokens; asked for them, it leaves the drafts with the executor."""

    def __init__(self, executor: OneCallExecutor, answer: Any) -> None:
        super().__init__()
        self._executor = executor
        self._answer = answer

    def result(self, timeout: float | None = None) -> Any:
        output, self._executor._drafts = self._answer.result(timeout)
        return output


def wait_in_naps() -> None:
    """From now on, whoever waits on one of vLLM's shared-memory queues in this process sleeps between two looks.

    vLLM looks again and again for a second, each time yielding the core but not the interpreter. Where there are cores
    to spare that saves a nap a step; on two, whoever waits takes the core of whoever is waited for, or of the learner
    (docs/decisions/033-who-waits-sleeps.md).
    """
    shm_broadcast.sched_yield = Naps()  # pyright: ignore[reportPrivateImportUsage]


class Naps:
    """One at each call. They grow with the wait, so that it lasts at most `LATE` of itself too long."""

    def __init__(self) -> None:
        self._began = self._ended = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._ended > NAP_S:  # in between there was something to do
            self._began = now
        time.sleep(min(LONGEST_NAP_S, NAP_S + LATE * (now - self._began)))
        self._ended = time.monotonic()
