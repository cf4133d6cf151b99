"""Versions that are applied in part, to the real vLLM on the CPU with requests in flight; what goes wrong meanwhile.

One engine serves all tests of this module. The last test kills it.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from msgspec import structs

import rollout.engine.vllm_setup
from databus.messages import Probe, Sampling
from databus.transfers import DeviceMemory
from rollout.config import RolloutConfig
from rollout.cuda_memory import word_sum
from rollout.engine.base import (
    Completion,
    EngineDead,
    GateRefused,
    GenerateRequest,
    Snapshot,
    UpdateFailed,
    UpdateReport,
)
from rollout.engine.vllm_engine import VllmEngine
from rollout.fetches import DeviceCopy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = RolloutConfig(context_tokens=400, max_sequences=64)
TOLERANCE = 1e-4
LONG_PROMPT = tuple(3 + (index * 7 + index // 5) % 14 for index in range(140))  # over a block of the KV cache
DEADLINE_S = 120.0

Weights = dict[str, torch.Tensor]


@dataclass
class Serving:
    """The engine, the loop it lives in, the weights of every version that it has served; what ran before it."""

    engine: VllmEngine
    runner: asyncio.Runner
    make_snapshot: Callable[..., Snapshot]
    history: dict[int, Weights] = field(default_factory=dict)
    others: list[psutil.Process] = field(default_factory=list)

    @property
    def weights(self) -> Weights:
        return self.history[self.engine.version]

    def run(self, scenario: Any) -> Any:
        return self.runner.run(asyncio.wait_for(scenario, DEADLINE_S))

    def next_version(self, names: Any = None, seed: int = 0, probe: Probe | None = None) -> tuple[Weights, Snapshot]:
        """Of the version after this one: some of the tensors moved a little. Args: names: which; None: all."""
        version = self.engine.version + 1
        generator = torch.Generator().manual_seed(1000 * seed + version)
        names = set(self.weights) if names is None else set(names)
        weights = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if name in names else tensor
            for name, tensor in self.weights.items()
        }
        snapshot = self.make_snapshot(weights, version, probe)
        return weights, replace(snapshot, base_version=version - 1, changed=frozenset(names))

    async def update(self, weights: Weights, snapshot: Snapshot) -> UpdateReport:
        self.history[snapshot.version] = weights
        try:
            return await self.engine.update(snapshot)
        finally:
            snapshot.close()

    def served(self) -> list[tuple[str, int, int]]:
        (tensors,) = self.run(self.engine._llm.collective_rpc("echelon_read_back"))
        return [tuple(each) for each in tensors]

    def fail(self, *fault: str) -> None:
        self.run(self.engine._llm.collective_rpc("fail_next_load", args=fault))

    def greedy(self) -> list[tuple[list[int], list[float], list[int]]]:
        completions = self.run(self.engine.generate(request("greedy", 2, 40, temperature=0.0)))
        return [(each.token_ids.tolist(), each.logprobs.tolist(), each.versions.tolist()) for each in completions]


@pytest.fixture(scope="module")
def serving(tiny_model: Path, tiny_weights: Weights, make_snapshot: Callable) -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(rollout.engine.vllm_setup, "WORKER_EXTENSION", "faulty_loader.FaultyLoader")
        others = below()
        engine = VllmEngine(CONFIG, str(tiny_model), seed=0, version=0)
        runner.run(asyncio.wait_for(engine.start(), 200))
        weights = {name: tensor.detach() for name, tensor in tiny_weights.items()}
        serving = Serving(engine, runner, make_snapshot, {0: weights}, others)
        serving.run(serving.update(*serving.next_version()))  # whole, by which the engine learns where all goes
        yield serving
        runner.run(asyncio.wait_for(engine.close(), 60))


def below() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def request(
    group_id: str, size: int, tokens: int, temperature: float = 1.0, prompt: tuple[int, ...] = LONG_PROMPT
) -> GenerateRequest:
    sampling = Sampling(max_tokens=tokens, temperature=temperature)
    return GenerateRequest(group_id=group_id, prompt_ids=prompt, group_size=size, sampling=sampling)


def test_fifty_versions_in_part_are_served_bit_for_bit(serving: Serving, reference: Callable) -> None:
    names = sorted(serving.weights)
    rng = np.random.default_rng(0)
    for _ in range(50):
        changed = rng.choice(names, int(rng.integers(0, 4)), replace=False).tolist()
        weights, snapshot = serving.next_version(changed)
        report = serving.run(serving.update(weights, snapshot))
        assert len(changed) <= report.loaded_tensors < len(names) / 2 + 2
        expected = [(spec.name, spec.xxh3, int(np.prod(spec.shape))) for spec in snapshot.manifest.tensors]
    assert serving.served() == expected
    for completion in serving.run(serving.engine.generate(request("after fifty", 8, 30))):
        np.testing.assert_allclose(
            completion.logprobs, reference(serving.weights, LONG_PROMPT, completion, 1.0), atol=TOLERANCE
        )


@pytest.mark.parametrize("kv", ["keep", "recompute", "drain"])
def test_spans_are_right_to_the_token_while_requests_come_and_go(
    serving: Serving, reference: Callable, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Six updates, one on the heels of the other, among short requests that share a prefix and long ones: every
    token's log-probability is that of the version that it is stamped with, on all that came before."""
    update = structs.replace(CONFIG.update, kv=kv)
    monkeypatch.setattr(serving.engine, "_config", structs.replace(CONFIG, update=update))
    finished: list[Completion] = []
    done = asyncio.Event()

    async def keep_busy(lane: int, tokens: int) -> None:
        turn = 0
        while not done.is_set():
            finished.extend(await serving.engine.generate(request(f"{kv}{lane}.{turn}", 2, tokens)))
            turn += 1

    async def scenario() -> None:
        lanes = [asyncio.ensure_future(keep_busy(lane, 40 if lane < 4 else 1 + lane % 3)) for lane in range(10)]
        for turn in range(6):
            goal = len(finished) + (16 if turn % 2 else 0)
            while len(finished) < goal:
                await asyncio.sleep(0.01)
            await serving.update(*serving.next_version(seed=1))
        done.set()
        await asyncio.gather(*lanes)

    serving.run(scenario())
    mixed = 0
    assert len({int(version) for completion in finished for version in completion.versions}) > 3
    for completion in finished:
        versions = np.unique(completion.versions)
        mixed += len(versions) > 1
        assert (np.diff(completion.versions) >= 0).all()
        for version in versions[:1] if kv == "keep" else versions:
            of_it = completion.versions == version
            expected = reference(serving.history[int(version)], LONG_PROMPT, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs[of_it], expected[of_it], atol=TOLERANCE)
    assert mixed == 0 if kv == "drain" else mixed > 8


def test_a_drain_that_takes_too_long_recomputes_the_rest(
    serving: Serving, reference: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = structs.replace(CONFIG.update, kv="drain", drain_s=0.05)
    monkeypatch.setattr(serving.engine, "_config", structs.replace(CONFIG, update=update))
    prompt, old = LONG_PROMPT[:9], serving.engine.version

    async def scenario() -> list[Completion]:
        flying = asyncio.ensure_future(serving.engine.generate(request("endless", 32, 380, prompt=prompt)))
        while not serving.engine._in_flight or serving.engine._without_token:
            await asyncio.sleep(0.01)
        await serving.update(*serving.next_version())
        return await flying

    completions = serving.run(scenario())
    assert any(set(completion.versions.tolist()) == {old, old + 1} for completion in completions)
    for completion in completions:
        for version in np.unique(completion.versions):
            of_it = completion.versions == version
            expected = reference(serving.history[int(version)], prompt, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs[of_it], expected[of_it], atol=TOLERANCE)


def test_a_refused_part_is_rolled_back_bit_for_bit(serving: Serving, make_probe: Callable) -> None:
    served, said = serving.served(), serving.greedy()
    probe = make_probe(serving.weights)
    weights, snapshot = serving.next_version(["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    snapshot = replace(
        serving.make_snapshot(weights, snapshot.version, probe),
        base_version=snapshot.base_version,
        changed=snapshot.changed,
    )
    with pytest.raises(GateRefused):
        serving.run(serving.update(weights, snapshot))
    assert serving.served() == served
    assert serving.greedy() == said
    weights, snapshot = serving.next_version(["model.norm.weight"], probe=None)
    probed = replace(
        serving.make_snapshot(weights, snapshot.version, make_probe(weights)),
        base_version=snapshot.base_version,
        changed=snapshot.changed,
    )
    report = serving.run(serving.update(weights, probed))
    assert report.mismatch is not None and report.mismatch.kl < 1e-8
    assert report.loaded_tensors == 1


def on_device(snapshot: Snapshot, wrong_by: int = 0) -> Snapshot:
    """The same buffer in a file that stands in for a GPU's memory. Args: wrong_by: what its sum of words is."""
    data = os.pread(snapshot.fd, snapshot.manifest.num_bytes, 0)
    descriptor = os.memfd_create("device")
    os.write(descriptor, data)
    memory = DeviceMemory(
        device_uuid="host",
        num_bytes=len(data),
        handle=f"/proc/{os.getpid()}/fd/{descriptor}".encode(),
        offset_bytes=0,
        counter=b"",
        counter_offset=snapshot.version,  # a descriptor's number comes again
        event=b"",
        has_event=False,
    )
    total = word_sum(torch.frombuffer(bytearray(data), dtype=torch.uint8)) + wrong_by
    return replace(snapshot, device_copy=DeviceCopy(memory=memory, word_sum=total))


@pytest.mark.parametrize(("names", "wrong_by"), [(None, 0), (["model.norm.weight"], 0), (None, 1)])
def test_a_version_in_the_gpus_memory_is_loaded_from_there(serving: Serving, names: Any, wrong_by: int) -> None:
    """Unless something else is there: then from host memory, as ever. It is what was checked either way."""
    serving.run(serving.engine._llm.collective_rpc("stand_in_for_gpu"))
    weights, snapshot = serving.next_version(names)
    snapshot = on_device(snapshot, wrong_by)
    assert snapshot.device_copy is not None
    handle = snapshot.device_copy.memory.handle.decode()
    serving.run(serving.update(weights, snapshot))
    (loaded_from,) = serving.run(serving.engine._llm.collective_rpc("stand_in_for_gpu"))
    assert loaded_from == ("" if wrong_by else handle)
    expected = [(spec.name, spec.xxh3, int(np.prod(spec.shape))) for spec in snapshot.manifest.tensors]
    assert serving.served() == expected
    os.close(int(handle.rpartition("/")[2]))


CHANGED = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.v_proj.weight")


@pytest.mark.parametrize(
    ("fault", "names", "why"),
    [
        (("raise", CHANGED[2]), CHANGED, "rolled back: RuntimeError: no model.layers.1.self_attn.v_proj"),
        (("raise", CHANGED[2]), None, "rolled back: RuntimeError: no model.layers.1.self_attn.v_proj"),
        (("spoil", CHANGED[0]), CHANGED, "'model.embed_tokens.weight' does not lie in the model as it was sent"),
        ((), CHANGED, "'model.layers.0.mlp.down_proj.weight' does not match its checksum"),
    ],
    ids=["in the middle of a part", "in the middle of the whole", "loaded wrongly", "corrupt"],
)
def test_the_old_version_serves_on_after(serving: Serving, fault: tuple[str, ...], names: Any, why: str) -> None:
    served, said, version = serving.served(), serving.greedy(), serving.engine.version
    weights, snapshot = serving.next_version(names)
    if fault:
        serving.fail(*fault)
    else:
        (spec,) = (spec for spec in snapshot.manifest.tensors if spec.name == CHANGED[1])
        os.pwrite(snapshot.fd, b"\x55\xaa", spec.offset + 8)
    with pytest.raises(UpdateFailed, match=why):
        serving.run(serving.update(weights, snapshot))
    assert serving.engine.version == version
    assert serving.served() == served
    assert serving.greedy() == said
    weights, snapshot = serving.next_version(CHANGED)
    serving.run(serving.update(weights, snapshot))
    assert [(name, xxh3) for name, xxh3, _ in serving.served()] == [(s.name, s.xxh3) for s in snapshot.manifest.tensors]


def test_a_tensor_that_is_said_to_be_as_before_and_is_not_is_loaded(serving: Serving) -> None:
    weights, snapshot = serving.next_version(CHANGED)
    serving.run(serving.update(weights, replace(snapshot, changed=frozenset(CHANGED[:1]))))
    assert [xxh3 for _, xxh3, _ in serving.served()] == [spec.xxh3 for spec in snapshot.manifest.tensors]


def test_a_worker_that_is_killed_in_the_middle_ends_the_engine(serving: Serving, tmp_path: Path) -> None:
    """And nothing is stamped with a version that it is not of: what was in flight fails."""
    flag = tmp_path / "in the middle"
    (worker,) = [child for child in below() if "Worker" in child.name() and child not in serving.others]

    async def scenario() -> list[Any]:
        flying = asyncio.ensure_future(serving.engine.generate(request("flying", 8, 90)))
        while serving.engine._without_token or not serving.engine._in_flight:
            await asyncio.sleep(0.01)
        updating = asyncio.ensure_future(serving.update(*serving.next_version(CHANGED)))
        while not flag.exists():
            await asyncio.sleep(0.01)
        os.kill(worker.pid, signal.SIGKILL)
        return await asyncio.gather(updating, flying, return_exceptions=True)

    version = serving.engine.version
    serving.fail("hang", CHANGED[1], str(flag))
    ended = serving.run(scenario())
    assert all(isinstance(each, EngineDead) for each in ended), ended
    assert serving.engine.version == version
    with pytest.raises(EngineDead):
        serving.run(serving.engine.generate(request("after", 1, 4)))
