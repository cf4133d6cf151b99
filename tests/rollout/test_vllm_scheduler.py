"""vLLM's scheduler with probes, without a model: who is scheduled in a pause, and in whose KV blocks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout.config import PROBE_SEQUENCES, PROBE_TOKENS, DraftConfig, RolloutConfig
from rollout.engine.vllm_setup import PROBE_ARGUMENT, engine_arguments, set_environment

CONFIG = RolloutConfig(context_tokens=256, max_sequences=4)
BLOCK_TOKENS = 16
NUM_BLOCKS = 41
"""One is vLLM's own. Twenty are kept for probes: four of 65 tokens each."""


@pytest.fixture(scope="module")
def vllm_config(tiny_model: Path) -> Any:
    set_environment(CONFIG, str(tiny_model))
    config = engine_arguments(CONFIG, str(tiny_model), 0, DraftConfig()).create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def scheduler(vllm_config: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from rollout.engine.vllm_scheduler import make_scheduler

    vllm_config.scheduler_config.async_scheduling = request.param
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=32, dtype=torch.float32)
    scheduler = make_scheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
    )
    assert isinstance(scheduler, AsyncScheduler) == request.param
    yield scheduler
    scheduler.shutdown()


def add(scheduler: Any, name: str, tokens: int, probe: bool = False) -> None:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)

    sampling = SamplingParams(
        max_tokens=1 if probe else 100,
        prompt_logprobs=0 if probe else None,
        extra_args={PROBE_ARGUMENT: True} if probe else None,
    )
    sampling.update_from_generation_config({}, 2)
    first = 1000 * len(scheduler.requests)  # prompts share no prefix
    prompt, hasher = list(range(first, first + tokens)), get_request_block_hasher(BLOCK_TOKENS, sha256)
    scheduler.add_request(Request(name, prompt, sampling, None, block_hasher=hasher))


def step(scheduler: Any) -> set[str]:
    """A step of the engine: who was scheduled, each given one token."""
    from vllm.v1.outputs import ModelRunnerOutput

    output = scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    sampled = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[5] for _ in names],
    )
    scheduler.update_from_output(output, sampled)
    return set(names)


def facts_of(scheduler: Any) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            name=request.request_id,
            computed=request.num_computed_tokens,
            blocks=scheduler.kv_cache_manager.get_block_ids(request.request_id),
            preemptions=request.num_preemptions,
        )
        for request in scheduler.running
    ]


def fill(scheduler: Any) -> None:
    """Four requests run, more wait, and no KV block is free; then everything pauses."""
    from vllm.v1.core.sched.interface import PauseState

    for index in range(6):
        add(scheduler, f"r{index}", 5 * BLOCK_TOKENS - 1)
    assert step(scheduler) == {"r0", "r1", "r2", "r3"}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 0
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not scheduler.has_requests()


def test_probes_run_through_a_pause_and_nothing_else_does(scheduler: Any) -> None:
    fill(scheduler)
    before, waiting = facts_of(scheduler), {request.request_id for request in scheduler.waiting}
    probes = {f"probe{index}" for index in range(PROBE_SEQUENCES)}
    for name in sorted(probes):
        add(scheduler, name, PROBE_TOKENS, probe=True)
    assert scheduler.has_requests()
    assert step(scheduler) == probes
    assert scheduler.has_finished_requests()
    assert step(scheduler) == set()
    assert not scheduler.has_requests()
    assert facts_of(scheduler) == before
    assert {request.request_id for request in scheduler.waiting} == waiting


def test_requests_go_on_where_they_were(scheduler: Any) -> None:
    from vllm.v1.core.sched.interface import PauseState

    fill(scheduler)
    before = facts_of(scheduler)
    add(scheduler, "probe", PROBE_TOKENS, probe=True)
    step(scheduler)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert step(scheduler) == {"r0", "r1", "r2", "r3"}
    for old, new in zip(before, facts_of(scheduler), strict=True):
        assert (new.computed, new.blocks, new.preemptions) == (old.computed + 1, old.blocks, 0)


def test_there_is_room_for_the_next_probe_and_a_cancelled_one_leaves(scheduler: Any) -> None:
    from vllm.v1.request import RequestStatus

    fill(scheduler)
    for turn in range(3):
        add(scheduler, f"probe{turn}", PROBE_TOKENS, probe=True)
        assert step(scheduler) == {f"probe{turn}"}
        assert step(scheduler) == set()
    add(scheduler, "cancelled", PROBE_TOKENS, probe=True)
    scheduler.finish_requests("cancelled", RequestStatus.FINISHED_ABORTED)
    assert step(scheduler) == set()
    assert not scheduler.has_requests()


def test_the_prefix_cache_can_be_reset(scheduler: Any) -> None:
    add(scheduler, "r", 40)
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
