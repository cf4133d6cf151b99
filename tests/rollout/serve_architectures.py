"""Run as a script: serves one tiny model after the other with vLLM, each in an engine of its own.

    python serve_architectures.py JOBS.json

A job names a folder with a model, where its next version can be pulled from, and how many ranks share each tensor
(`ranks`, one without it). The engine starts from the folder,
takes up the version while requests are in flight, then some more of which only a few tensors have changed. What was
sampled before, across and after, and with the last of them, goes to `result`; with what was read back of each of these,
and the last one's weights, as a file beside it.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
from safetensors.torch import save_file

from databus.messages import Sampling
from rollout.config import RolloutConfig
from rollout.engine import vllm_engine
from rollout.engine.base import Completion, GenerateRequest, Snapshot
from rollout.engine.tensors import tensors
from rollout.engine.vllm_engine import VllmEngine
from rollout.engine.vllm_setup import engine_arguments

CONFIG = RolloutConfig(context_tokens=26, max_sequences=16)
PROMPT = (6, 13, 8, 14, 9, 5, 13, 7, 14, 3)  # with the answer, longer than any window
GROUP = 6
LANES = (16, 13, 11)
"""Tokens a completion, lane by lane: of different lengths, as else all could be between two groups at the switch."""
PARTS = 4
EVERY = 5
"""Every so many-th tensor changes from one version to the next, each time others."""
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
    if job.get("ranks", 1) > 1:  # by itself vLLM 0.32.0 wants a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(job["ranks"])
        )
    try:
        groups = asyncio.run(serve(job))
        np.savez(result, **{f"{name}.{key}": value for name, group in groups.items() for key, value in flat(group)})
    except Exception as error:
        result.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")


async def serve(job: dict[str, Any]) -> dict[str, list[Completion]]:
    engine = VllmEngine(CONFIG, job["model"], seed=0, version=0)
    vllm_engine.engine_arguments = lambda *given: replace(
        engine_arguments(*given), tensor_parallel_size=job.get("ranks", 1)
    )
    await engine.start()
    # Not before: vLLM 0.32.0 looks through all modules while it starts, and fails over one of llvmlite's, which
    # whatever compiles with Numba loads.
    from rollout.weights_in import pull_snapshot

    try:
        snapshot = await asyncio.to_thread(pull_snapshot, job["address"], 1, job["num_bytes"], threading.Event())
        before = await engine.generate(request("before"))
        across: list[Completion] = []
        lanes = [asyncio.ensure_future(keep_busy(engine, max_tokens, across)) for max_tokens in LANES]
        while not across:  # on a busy machine the first ones can take long to come in
            await asyncio.sleep(0.01)
        await engine.update(snapshot)
        await asyncio.gather(*lanes)
        groups = {"before": before, "across": across, "after": await engine.generate(request("after"))}
        await serve_parts(engine, snapshot, Path(job["result"]).parent)
        return groups | {"parts": await engine.generate(request("parts"))}
    finally:
        await engine.close()


async def serve_parts(engine: VllmEngine, snapshot: Snapshot, folder: Path) -> None:
    """Apply some versions in part; write to `folder` what was read back of them, and the last one's weights."""
    read = []
    for _ in range(PARTS):
        before, snapshot = snapshot, next_part(snapshot)
        report = await engine.update(snapshot)
        before.close()
        ranks = await engine._llm.collective_rpc("echelon_read_back")
        sent = [(spec.name, spec.xxh3, int(np.prod(spec.shape))) for spec in snapshot.manifest.tensors]
        read_elements = [sum(count for *_, count in tensor) for tensor in zip(*ranks, strict=True)]
        read.append(
            {
                "loaded": report.loaded_tensors,
                "changed": len(snapshot.changed or ()),
                "wrong": [
                    name
                    for back in ranks
                    for (name, xxh3, _), (_, there, _) in zip(sent, back, strict=True)
                    if there != xxh3
                ],
                "unread": [name for (name, _, size), count in zip(sent, read_elements, strict=True) if count < size],
                "tensors": len(sent),
            }
        )
    (folder / "read.json").write_text(json.dumps(read))
    weights = {name: tensor.clone() for name, tensor in tensors(snapshot.manifest, snapshot.map())}
    save_file(weights, folder / "parts.safetensors", {"format": "pt"})
    snapshot.close()


def next_part(snapshot: Snapshot) -> Snapshot:
    data = bytearray(snapshot.map()[:])
    specs = list(snapshot.manifest.tensors)
    changed = set()
    for index in range(snapshot.version % EVERY, len(specs), EVERY):
        spec = specs[index]
        part = slice(spec.offset, spec.offset + spec.num_bytes)
        values = np.frombuffer(data[part], np.float32) * np.float32(1.05)
        data[part] = values.tobytes()
        specs[index] = msgspec.structs.replace(spec, xxh3=xxhash.xxh3_64_intdigest(values.tobytes()))
        changed.add(spec.name)
    version = snapshot.version + 1
    fd = os.memfd_create(f"part-{version}")
    os.write(fd, data)
    manifest = msgspec.structs.replace(snapshot.manifest, version=version, tensors=tuple(specs), probe=None)
    return replace(
        snapshot, version=version, manifest=manifest, fd=fd, base_version=version - 1, changed=frozenset(changed)
    )


async def keep_busy(engine: VllmEngine, max_tokens: int, completions: list[Completion]) -> None:
    """One group after the other until the new version is served: whenever it comes, some are under way."""
    turn = 0
    while engine.version == 0:
        completions += await engine.generate(request(f"lane{max_tokens}.{turn}", max_tokens))
        turn += 1


def request(group_id: str, max_tokens: int = CONFIG.context_tokens - len(PROMPT)) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0)
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
