"""Run as a script: serves one tiny model after the other with vLLM, each in an engine of its own.

    python serve_architectures.py JOBS.json

A job names a folder with a model, and where its next version can be pulled from. The engine starts from the folder,
takes up the version while requests are in flight, and what was sampled before, across and after goes to `result`.

vLLM takes ten seconds to import, in each of three processes. Here it is imported once: engines are forked from this
process, and run their worker within their core, which is as vLLM does it on a GPU.
"""

import asyncio
import importlib
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from databus.messages import Sampling
from rollout.config import RolloutConfig
from rollout.engine.base import Completion, GenerateRequest
from rollout.engine.vllm_engine import VllmEngine
from rollout.weights_in import pull_snapshot

CONFIG = RolloutConfig(context_tokens=26, max_sequences=16)
PROMPT = (6, 13, 8, 14, 9, 5, 13, 7, 14, 3)  # with the answer, longer than any window
GROUP = 6
LANES = 2
JOB_TIMEOUT_S = 90.0
MODEL_MODULES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "qwen3_moe")


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = "1"
    import_vllm()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        process = multiprocessing.get_context("fork").Process(target=run, args=(job,))
        process.start()
        process.join(JOB_TIMEOUT_S)
        process.kill()
        process.join()


def import_vllm() -> None:
    """All that an engine needs; its processes are then forked where it asks for new ones."""
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.utils
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker

    import rollout.engine.vllm_worker  # noqa: F401

    registry._run_in_subprocess = lambda look: look()
    for name in MODEL_MODULES:
        importlib.import_module(f"vllm.model_executor.models.{name}")
    vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def run(job: dict[str, Any]) -> None:
    result = Path(job["result"])
    try:
        groups = asyncio.run(serve(job))
        np.savez(result, **{f"{name}.{key}": value for name, group in groups.items() for key, value in flat(group)})
    except Exception as error:
        result.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")


async def serve(job: dict[str, Any]) -> dict[str, list[Completion]]:
    engine = VllmEngine(CONFIG, job["model"], seed=0, version=0)
    await engine.start()
    try:
        snapshot = await asyncio.to_thread(pull_snapshot, job["address"], 1, job["num_bytes"], threading.Event())
        before = await engine.generate(request("before"))
        across: list[Completion] = []
        lanes = [asyncio.ensure_future(keep_busy(engine, lane, across)) for lane in range(LANES)]
        await asyncio.sleep(0.1)
        await engine.update(snapshot)
        snapshot.close()
        await asyncio.gather(*lanes)
        return {"before": before, "across": across, "after": await engine.generate(request("after"))}
    finally:
        await engine.close()


async def keep_busy(engine: VllmEngine, lane: int, completions: list[Completion]) -> None:
    """One group after the other until the new version is served: whenever it comes, some are under way."""
    turn = 0
    while engine.version == 0:
        completions += await engine.generate(request(f"lane{lane}.{turn}"))
        turn += 1


def request(group_id: str) -> GenerateRequest:
    sampling = Sampling(max_tokens=CONFIG.context_tokens - len(PROMPT), temperature=1.0)
    return GenerateRequest(group_id=group_id, prompt_ids=PROMPT, group_size=GROUP, sampling=sampling)


def flat(group: list[Completion]) -> list[tuple[str, np.ndarray]]:
    """Columns of a group's completions, end to end."""
    return [
        ("lengths", np.array([len(each.token_ids) for each in group])),
        *(
            (name, np.concatenate([getattr(each, name) for each in group]))
            for name in ("token_ids", "logprobs", "versions")
        ),
    ]


if __name__ == "__main__":
    main()
