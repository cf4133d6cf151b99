"""vLLM's own scheduler, which lets probes through a pause, and holds log-probabilities until somebody looks at them.
Written against vLLM 0.32.0.

`pause_generation(mode="keep")` stops the scheduler as a whole. The mismatch gate needs the engine to score a few texts
with weights that no other request may see yet: requests that are marked as probes run through the pause, as if they
were alone, and the others stay where they are, with their KV cache. There is always room for probes: sequences beyond
those that run, and KV blocks that are given to nobody else.
"""

from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from rollout.config import PROBE_SEQUENCES, PROBE_TOKENS
from rollout.engine.begin_order import BEGUN
from rollout.engine.held_logprobs import HeldLogprobs
from rollout.engine.vllm_setup import PROBE_ARGUMENT


def make_scheduler(*, vllm_config: Any, **arguments: Any) -> Scheduler:
    """For vLLM's `scheduler_cls`: by then it has settled whether scheduling is asynchronous."""
    kind = AsyncProbingScheduler if vllm_config.scheduler_config.async_scheduling else ProbingScheduler
    return kind(vllm_config=vllm_config, **arguments)


class ProbingScheduler(Scheduler):
    """`max_num_seqs` must have room for `PROBE_SEQUENCES` beside the requests that are to run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_num_active_reqs -= PROBE_SEQUENCES
        tokens = PROBE_TOKENS + 1 + self.num_lookahead_tokens
        groups = self.kv_cache_config.kv_cache_groups
        self._room_blocks = PROBE_SEQUENCES * sum(cdiv(tokens, group.kv_cache_spec.block_size) for group in groups)
        self._room: list[Any] = []
        self._held_logprobs = HeldLogprobs()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._pause_state != PauseState.PAUSED_ALL or not self._num_probes():
            self._keep_room()
            return super().schedule(*args, **kwargs)
        self._give_room()
        running, waiting = self.running, self.waiting
        self.running, others = _parted(running)
        self.waiting = create_request_queue(self.policy)
        probes, _ = _parted(waiting)
        waiting.remove_requests(probes)
        for probe in probes:
            self.waiting.add_request(probe)
        self._pause_state = PauseState.UNPAUSED
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._pause_state = PauseState.PAUSED_ALL
            for probe in self.waiting:
                waiting.add_request(probe)
            self.running, self.waiting = [*others, *self.running], waiting

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        for each in outputs.values():
            self._held_logprobs.pass_through(each.outputs, self._interval_of)
        return outputs

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        ended = super().finish_requests(*args, **kwargs)
        self._held_logprobs.keep_only(self.requests)
        return ended

    def get_num_unfinished_requests(self) -> int:
        return (
            self._num_probes() if self._pause_state == PauseState.PAUSED_ALL else super().get_num_unfinished_requests()
        )

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self._give_room()  # vLLM refuses while any block is in use
        if reset_running_requests:
            for request in self.running:
                request.priority = BEGUN  # they wait now, and none that waited already is to overtake them
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _interval_of(self, request_id: str) -> int:
        sampling = self.requests[request_id].sampling_params
        return (sampling and sampling.stream_interval) or 1

    def _num_probes(self) -> int:
        return sum(map(_is_probe, self.running)) + sum(map(_is_probe, self.waiting))

    def _keep_room(self) -> None:
        pool = self.kv_cache_manager.block_pool
        if not self._room and pool.get_num_free_blocks() >= self._room_blocks:
            self._room = pool.get_new_blocks(self._room_blocks)

    def _give_room(self) -> None:
        self.kv_cache_manager.block_pool.free_blocks(self._room)
        self._room = []


class AsyncProbingScheduler(ProbingScheduler, AsyncScheduler):
    """Where steps are scheduled ahead of what the one before has sampled."""


def _is_probe(request: Request) -> bool:
    sampling = request.sampling_params
    return sampling is not None and PROBE_ARGUMENT in (sampling.extra_args or {})


def _parted(requests: Any) -> tuple[list[Request], list[Request]]:
    """(probes, others)."""
    probes = [request for request in requests if _is_probe(request)]
    return probes, [request for request in requests if not _is_probe(request)]
