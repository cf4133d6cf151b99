"""How vLLM is told what to be: its environment and its arguments. Written against vLLM 0.32.0."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from databus.process import spawned_die_with_parent
from rollout.config import PROBE_SEQUENCES, DraftConfig, RolloutConfig
from rollout.drafting.proposer import PROPOSER

WORKER_EXTENSION = "rollout.engine.vllm_worker.SnapshotLoader"
EXECUTOR = "rollout.engine.vllm_executor.OneCallExecutor"
PROBE_ARGUMENT = "echelon_probe"
"""Marks a probe, in `SamplingParams(extra_args=...)`."""
PROBING_SCHEDULER = "rollout.engine.vllm_scheduler.make_scheduler"


def set_environment(config: RolloutConfig, model: str) -> None:
    """vLLM reads its settings from the environment, some of them while it is imported. What the user set stays."""
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(max(1, int(config.start_timeout_s))),
        # this process has threads of its own by then, which a fork would leave behind holding locks
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
        # vLLM's processes end without giving back their shared memory; Python does it for them, and complains.
        "PYTHONWARNINGS": "ignore:resource_tracker",
    }
    if config.device == "cpu":
        settings["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
        if config.enforce_eager:
            # vLLM 0.32.0 compiles its log-probability ops even so: that needs a C++ compiler, and ten seconds.
            settings["TORCH_COMPILE_DISABLE"] = "1"
    if Path(model).is_dir():
        settings["HF_HUB_OFFLINE"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def check_installed(device: str) -> None:
    """Raises: ValueError, one line, where there is no vLLM or one that was built for another device."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("rollout.engine=vllm, but vLLM is not installed: run `make setup` (GPU: `make setup GPU=1`)")
    from vllm.platforms import current_platform

    built_for = current_platform.device_type or "no device of this machine"
    if built_for != device:
        raise ValueError(
            f"rollout.device={device}, but the installed vLLM runs on {built_for}: "
            f"set rollout.device or run `make setup{' GPU=1' if device == 'cuda' else ''}`"
        )


def leaves_memory(config: RolloutConfig, takes_turns: bool) -> bool:
    """Does the engine leave the device's memory to the learner in its turns? vLLM cannot on the CPU."""
    return takes_turns and config.device == "cuda" and config.off_turn == "sleep"


def engine_arguments(
    config: RolloutConfig, model: str, seed: int, draft: DraftConfig, takes_turns: bool = False
) -> Any:
    """vLLM's `AsyncEngineArgs`. Args: takes_turns: with a learner on its device."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    own_scheduler = config.gate.is_on or config.update.kv != "keep"
    return AsyncEngineArgs(
        model=model,
        dtype=config.dtype,
        seed=seed,
        max_model_len=config.context_tokens,
        max_num_seqs=config.max_sequences + (PROBE_SEQUENCES if own_scheduler else 0),
        scheduler_cls=PROBING_SCHEDULER if own_scheduler else None,
        enforce_eager=config.enforce_eager,
        gpu_memory_utilization=config.gpu_memory_fraction,
        enable_sleep_mode=leaves_memory(config, takes_turns),
        logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
        skip_tokenizer_init=True,  # token ids in, token ids out
        enable_prefix_caching=True,
        # What waits is begun by priority. Where the KV cache runs out, 0.32.0 puts back the running request with the
        # highest number, the shortest predicted, and that is the cheapest to compute again; one that is waiting never
        # displaces one that runs.
        scheduling_policy="priority",
        disable_log_stats=True,
        worker_extension_cls=WORKER_EXTENSION,
        speculative_config=speculation(draft),
        distributed_executor_backend=EXECUTOR if config.device == "cpu" else None,
    )


def speculation(draft: DraftConfig) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for our proposer; None where nothing is to be drafted."""
    if draft.policy == "off":
        return None
    return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": draft.max_tokens}


@contextmanager
def tied_engine_cores() -> Iterator[None]:
    """Engine cores started inside die with this process, whatever they are at; vLLM has no setting for it."""
    from vllm.v1.engine.core import EngineCoreProc

    from rollout.engine.vllm_worker import run_tied_engine_core

    original = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run_tied_engine_core)
    try:
        with spawned_die_with_parent():
            yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(original)
