"""The real vLLM on the CPU. One engine serves all tests of this module: its start takes half a minute."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xxhash
from msgspec import structs
from transformers import AutoTokenizer

from databus.messages import AdaptedWeight, Adapter, Sampling
from rollout.config import EnvironmentConfig, ReasoningConfig, RolloutConfig
from rollout.engine.base import (
    Completion,
    EngineError,
    GateRefused,
    GenerateRequest,
    Snapshot,
    UpdateFailed,
    UpdateReport,
)
from rollout.engine.reasoning import ReasoningEngine
from rollout.engine.vllm_engine import VllmEngine
from rollout.environments.base import Step
from rollout.environments.turn_tokens import TurnTokens
from rollout.episodes import Episodes
from rollout.merging import MergingPull

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = RolloutConfig(context_tokens=400, max_sequences=64)
TOLERANCE = 1e-4
PROMPT = (6, 13, 8, 14)
LONG_PROMPT = tuple(3 + (index * 7 + index // 5) % 14 for index in range(300))  # over two blocks of the KV cache
DEADLINE_S = 90.0
START_S = 300.0
GONE_S = 5.0
"""For the kernel to end what it was told to end."""


@dataclass
class Served:
    """The shared engine, the loop it lives in, and the weights that it serves now."""

    engine: VllmEngine
    runner: asyncio.Runner
    weights: dict[str, torch.Tensor]

    def run(self, scenario: Any) -> Any:
        return self.runner.run(asyncio.wait_for(scenario, DEADLINE_S))

    async def update(self, snapshot: Snapshot, weights: dict[str, torch.Tensor]) -> UpdateReport:
        report = await self.engine.update(snapshot)
        snapshot.close()
        self.weights = weights
        return report


@pytest.fixture(scope="module")
def served(tiny_model: Path, tiny_weights: dict) -> Iterator[Served]:
    engine = VllmEngine(CONFIG, str(tiny_model), seed=0, version=3)
    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(engine.start(), 200))
        yield Served(engine, runner, tiny_weights)
        runner.run(asyncio.wait_for(engine.close(), 60))
    assert not [child for child in psutil.Process().children(recursive=True) if "VLLM" in child.name()]


def request(
    group_id: str, size: int = 8, tokens: int = 60, temperature: float = 1.0, prompt: tuple[int, ...] = PROMPT
) -> GenerateRequest:
    sampling = Sampling(max_tokens=tokens, temperature=temperature)
    return GenerateRequest(group_id=group_id, prompt_ids=prompt, group_size=size, sampling=sampling)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_sampling_distribution(
    served: Served, reference: Callable, temperature: float
) -> None:
    completions: list[Completion] = served.run(
        served.engine.generate(request(f"t{temperature}", temperature=temperature, size=16))
    )
    for completion in completions:
        expected = reference(served.weights, PROMPT, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
        assert (completion.versions == served.engine.version).all()
        assert completion.truncated == (completion.token_ids[-1] != 2)
        assert (completion.token_ids[:-1] != 2).all()
    different = len({tuple(completion.token_ids) for completion in completions})
    assert different == 1 if temperature == 0.0 else different > 8


def test_context_bounds_the_completion(served: Served) -> None:
    prompt = LONG_PROMPT + LONG_PROMPT[:97]
    completions: list[Completion] = served.run(
        served.engine.generate(request("bounded", tokens=50, prompt=prompt, size=16))
    )
    assert max(len(completion.token_ids) for completion in completions) == 3
    with pytest.raises(EngineError, match="prompt of 400 tokens, context of 400"):
        served.run(served.engine.generate(request("full", prompt=prompt[:1] * 400)))


def test_asleep_it_computes_nothing_and_goes_on_afterwards(served: Served, reference: Callable) -> None:
    """On the CPU it pauses; what it has in flight, and what comes meanwhile, is as if it had not."""

    async def scenario() -> list[list[Completion]]:
        group = asyncio.ensure_future(served.engine.generate(request("asleep", tokens=300)))
        await asyncio.sleep(0.2)
        await served.engine.sleep()
        late = asyncio.ensure_future(served.engine.generate(request("late", tokens=20)))
        await asyncio.sleep(1.5)  # for a second vLLM 0.32.0's worker looks out for the next step without a pause
        seconds = cpu_seconds()
        await asyncio.sleep(1.5)
        assert cpu_seconds() - seconds < 0.3, "the engine's processes are at work"
        assert not group.done() and not late.done()
        await served.engine.wake()
        return [await group, await late]

    for completions in served.run(scenario()):
        for completion in completions:
            expected = reference(served.weights, PROMPT, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
            assert (completion.versions == served.engine.version).all()


def cpu_seconds() -> float:
    """Of vLLM's processes."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def test_the_longest_predicted_is_begun_first(served: Served) -> None:
    ended: list[str] = []

    async def generate(name: str, predicted: int, size: int) -> None:
        await served.engine.generate(replace(request(name, size=size, tokens=20), predicted_tokens=predicted))
        ended.append(name)

    async def scenario() -> None:
        full = asyncio.ensure_future(generate("full", 20, CONFIG.max_sequences))
        await asyncio.sleep(0.05)
        # Together they have room for half of themselves at a time, once the engine has any.
        await asyncio.gather(generate("short", 1, 32), generate("long", 20, 32), generate("short too", 1, 32), full)

    served.run(scenario())
    assert ended.index("long") < min(ended.index("short"), ended.index("short too"))


def test_a_refused_version_leaves_what_lies_on_disk(
    served: Served, other_weights: Callable, make_snapshot: Callable, make_probe: Callable
) -> None:
    """Its tensors are as they were sent, and pass every checksum; they are not what the learner has scored."""
    version, group = served.engine.version, request("greedy", size=2, temperature=0.0)
    before: list[Completion] = served.run(served.engine.generate(group))
    scaled = dict(served.weights) | {"model.norm.weight": served.weights["model.norm.weight"] * 1.5}
    altered = make_snapshot(scaled, version + 1, make_probe(served.weights))
    with pytest.raises(GateRefused, match="mismatch gate: engine and learner differ on the probe by KL") as refused:
        served.run(served.engine.update(altered))
    altered.close()
    assert refused.value.mismatch.kl > served.engine._config.gate.max_kl
    assert served.engine.version == version
    after: list[Completion] = served.run(served.engine.generate(replace(group, group_id="again")))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.token_ids, new.token_ids)
        np.testing.assert_array_equal(old.logprobs, new.logprobs)
        assert (new.versions == version).all()


def test_update_in_flight_switches_at_a_token(
    served: Served, other_weights: Callable, make_snapshot: Callable, make_probe: Callable, reference: Callable
) -> None:
    """Ten updates while groups come and go, and in between some that the mismatch gate refuses; every token's version
    must be that of the weights that sampled it."""
    history = {served.engine.version: served.weights}
    finished: list[list[Completion]] = []

    async def keep_busy(lane: int) -> None:
        for turn in range(1000):
            if served.engine.version >= 13:
                return
            finished.append(await served.engine.generate(request(f"busy{lane}.{turn}", size=8, tokens=150)))

    async def some_more() -> None:
        """By groups, not by seconds: a slow machine must see as many begin and end under each version."""
        goal = len(finished) + 6
        async with asyncio.timeout(60):
            while len(finished) < goal:
                await asyncio.sleep(0.02)

    async def scenario() -> None:
        lanes = [asyncio.ensure_future(keep_busy(lane)) for lane in range(6)]
        for version in range(4, 14):
            await some_more()
            history[version] = other_weights(version)
            probe = make_probe(history[version])
            if version % 3 == 0:
                with pytest.raises(GateRefused):
                    await served.update(make_snapshot(other_weights(1000), version, probe), {})
                await some_more()
            report = await served.update(make_snapshot(history[version], version, probe), history[version])
            assert 0 < report.pause_s < 30
            assert report.mismatch is not None and report.mismatch.kl < 1e-8
            assert served.engine.version == version
        await asyncio.gather(*lanes)

    served.run(scenario())
    completions = [completion for group in finished for completion in group]
    mixed = [completion for completion in completions if completion.versions[0] != completion.versions[-1]]
    pure_later = [c for c in completions if c.versions[0] == c.versions[-1] and c.versions[0] > 3]
    assert len(mixed) > 20
    assert len(pure_later) > 20
    for completion in completions:
        assert (np.diff(completion.versions) >= 0).all()
        first = completion.versions == completion.versions[0]
        expected = reference(history[int(completion.versions[0])], PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs[first], expected[first], atol=TOLERANCE)
    for completion in mixed:  # the token after the switch is no longer the old weights'
        switch = int((completion.versions == completion.versions[0]).sum())
        old = reference(history[int(completion.versions[0])], PROMPT, completion, 1.0)
        assert abs(old[switch] - completion.logprobs[switch]) > 1e-5


def test_prefix_cache_is_not_shared_across_versions(
    served: Served, other_weights: Callable, make_snapshot: Callable, reference: Callable
) -> None:
    new = other_weights(99)

    async def scenario() -> list[Completion]:
        await served.engine.generate(request("warm", prompt=LONG_PROMPT, tokens=4))
        await served.update(make_snapshot(new, served.engine.version + 1), new)
        return await served.engine.generate(request("after", prompt=LONG_PROMPT, tokens=4))

    for completion in served.run(scenario()):
        expected = reference(new, LONG_PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)


def test_requests_without_a_token_begin_anew_after_an_update(
    served: Served, other_weights: Callable, make_snapshot: Callable, make_probe: Callable, reference: Callable
) -> None:
    """More requests than the engine runs at once; those that wait must not find the old version's prefix."""
    old, new, version = served.weights, other_weights(98), served.engine.version

    async def scenario() -> list[Completion]:
        flying = asyncio.ensure_future(
            served.engine.generate(request("queue", prompt=LONG_PROMPT, size=3 * CONFIG.max_sequences, tokens=99))
        )
        while not served.engine.stats().running_sequences:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.15)
        with pytest.raises(GateRefused):
            await served.update(make_snapshot(new, version + 1, make_probe(old)), {})
        await served.update(make_snapshot(new, version + 1, make_probe(new)), new)
        return await flying

    completions: list[Completion] = served.run(scenario())
    begun_after = [completion for completion in completions if completion.versions[0] == version + 1]
    begun_before = [completion for completion in completions if completion.versions[0] == version]
    assert len(begun_after) > 20
    assert len(begun_before) > 20
    for completion in begun_after:
        expected = reference(new, LONG_PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
    for completion in begun_before:
        count = int((completion.versions == version).sum())
        expected = reference(old, LONG_PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs[:count], expected[:count], atol=TOLERANCE)


def test_an_adapter_is_served_merged_with_the_folder(
    served: Served,
    tiny_model: Path,
    tiny_weights: dict,
    make_snapshot: Callable,
    make_probe: Callable,
    reference: Callable,
) -> None:
    """With what lies on disk, whatever is served; and the gate finds what the learner says beside its adapter."""
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
    generator, version = torch.Generator().manual_seed(0), served.engine.version + 1
    weights, factors, adapted = dict(tiny_weights), {}, []
    for name in names:
        base = tiny_weights[name].detach()
        a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((4, base.shape[1]), (base.shape[0], 4)))
        weights[name] = base + 0.5 * (b @ a)
        factors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        adapted.append(AdaptedWeight(name=name, base_xxh3=xxhash.xxh3_64_intdigest(base.numpy().data)))
    pulled = make_snapshot(factors, version, make_probe(weights))
    manifest = structs.replace(pulled.manifest, adapter=Adapter(scale=0.5, weights=tuple(adapted)))
    pull = MergingPull(lambda *_: replace(pulled, manifest=manifest), str(tiny_model), "float32")

    async def scenario() -> tuple[UpdateReport, list[Completion]]:
        report = await served.update(pull("ipc://unused", version, 0, threading.Event()), weights)
        return report, await served.engine.generate(request("merged"))

    report, completions = served.run(scenario())
    assert report.mismatch is not None and report.mismatch.kl < 1e-8
    for completion in completions:
        assert (completion.versions == version).all()
        np.testing.assert_allclose(completion.logprobs, reference(weights, PROMPT, completion, 1.0), atol=TOLERANCE)


def test_budgets_of_thinking_and_solution(
    served: Served, tiny_model: Path, reference: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def already_started() -> None: ...

    budgets = ReasoningConfig(thinking_tokens=12, solution_tokens=20, end="=;")
    monkeypatch.setattr(served.engine, "start", already_started)
    budgeted = ReasoningEngine(served.engine, structs.replace(CONFIG, reasoning=budgets), str(tiny_model))

    async def scenario() -> list[Completion]:
        await budgeted.start()
        return await budgeted.generate(request("thinking", size=32, tokens=100))

    completions: list[Completion] = served.run(scenario())
    masks = [completion.sampled().astype(bool) for completion in completions]
    forced = [completion for completion, mask in zip(completions, masks, strict=True) if not mask.all()]
    assert len(forced) > 4
    assert any(completion.truncated for completion in completions)
    assert len({tuple(completion.token_ids) for completion in completions}) > 16
    for completion, mask in zip(completions, masks, strict=True):
        expected = reference(served.weights, PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs[mask], expected[mask], atol=TOLERANCE)
        assert (completion.versions == served.engine.version).all()
        assert len(completion.token_ids) <= 12 + 2 + 20
        assert completion.truncated == (completion.token_ids[-1] != 2)
        assert completion.token_ids[~mask].tolist() in ([], [15], [14, 15])
        assert mask[:12].all()


def test_episodes_of_several_turns(
    served: Served, tiny_model: Path, other_weights: Callable, make_snapshot: Callable, reference: Callable
) -> None:
    """Two turns with answers between them, and other weights before the second of them."""

    class Answers:
        async def reset(self, problem: dict[str, Any]) -> int:
            return 0

        async def step(self, state: int, turn: str) -> Step:
            first_turns.extend([turn] if state == 0 else [])
            if state == 0 and len(first_turns) == 4:
                version = served.engine.version + 1
                await served.update(make_snapshot(other_weights(version), version), other_weights(version))
            return Step(output="12+3", state=state + 1, done=state == 1)

    first_turns: list[str] = []
    old, version = served.weights, served.engine.version
    config = EnvironmentConfig(name="test", before=";", after="=")
    tokens = TurnTokens(AutoTokenizer.from_pretrained(tiny_model), config)
    episodes = Episodes(served.engine, Answers(), tokens, lambda ids: "", config, CONFIG.context_tokens)
    played = served.run(episodes.play(request("episodes", size=16, tokens=150), {}))
    both = [each.completion for each in played if len(each.transcript) == 3]
    assert len(both) > 4
    for completion in both:
        mask = completion.sampled().astype(bool)
        assert completion.token_ids[~mask].tolist() == [15, 4, 5, 13, 6, 14]
        end = int(np.argmin(mask))
        assert completion.token_ids[end - 1] == 2, "the first turn has ended by itself"
        for weights, its_version in ((old, version), (served.weights, version + 1)):
            its_own = mask & (completion.versions == its_version)
            expected = reference(weights, PROMPT, completion, 1.0)
            for turn in (np.s_[:end], np.s_[end:]):
                picked = its_own[turn]
                if (picked != mask[turn]).any():
                    continue  # only one that is of a version from its begin to its end is of its weights alone
                np.testing.assert_allclose(completion.logprobs[turn][picked], expected[turn][picked], atol=TOLERANCE)
    assert any((each.versions[0], each.versions[-1]) == (version, version + 1) for each in both)


def serves_what_it_says(served: Served, reference: Callable, name: str) -> bool:
    completions: list[Completion] = served.run(served.engine.generate(request(name)))
    return all(
        np.abs(completion.logprobs - reference(served.weights, PROMPT, completion, 1.0)).max() < TOLERANCE
        and (completion.versions == served.engine.version).all()
        for completion in completions
    )


def test_a_corrupt_snapshot_changes_nothing(
    served: Served, other_weights: Callable, make_snapshot: Callable, reference: Callable
) -> None:
    version = served.engine.version
    snapshot = make_snapshot(other_weights(5), version + 1)
    os.pwrite(snapshot.fd, b"\x55", 1000)
    with pytest.raises(UpdateFailed, match="does not match its checksum"):
        served.run(served.engine.update(snapshot))
    lacking = {name: tensor for name, tensor in other_weights(5).items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(UpdateFailed, match=r"up_proj.weight' is missing"):
        served.run(served.engine.update(make_snapshot(lacking, version + 1)))
    assert served.engine.version == version
    assert serves_what_it_says(served, reference, "after corrupt")


def test_a_load_that_fails_half_way_is_rolled_back(
    served: Served,
    other_weights: Callable,
    make_snapshot: Callable,
    reference: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Anything:
        def check(self, manifest: object) -> None:
            pass

    version = served.engine.version
    weights = other_weights(6)
    weights["model.norm.weight"] = torch.zeros(3)
    with monkeypatch.context() as patch:
        patch.setattr(served.engine._update, "_expected", Anything())
        with pytest.raises(UpdateFailed, match="rolled back"):
            served.run(served.engine.update(make_snapshot(weights, version + 1)))
    assert served.engine.version == version
    assert serves_what_it_says(served, reference, "after rollback")
    new = other_weights(7)
    served.run(served.update(make_snapshot(new, version + 1), new))
    assert serves_what_it_says(served, reference, "after the next update")


def test_cancelling_aborts_in_the_engine(served: Served) -> None:
    async def scenario() -> None:
        endless = asyncio.ensure_future(served.engine.generate(request("endless", size=32, tokens=390)))
        await asyncio.sleep(0.2)
        assert served.engine.stats().running_sequences > 0
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert served.engine.stats().running_sequences == 0
        assert not served.engine._llm.output_processor.has_unfinished_requests()
        assert len(await served.engine.generate(request("endless", size=2))) == 2

    served.run(scenario())


ORPHAN_SCRIPT = """
import asyncio, contextlib, sys
from rollout.config import RolloutConfig
from rollout.engine.base import EngineDead
from rollout.engine.vllm_engine import VllmEngine

async def main():
    config = RolloutConfig(context_tokens=64, max_sequences=4, start_timeout_s=float(sys.argv[2]))
    engine = VllmEngine(config, sys.argv[1], 0, 0)
    try:
        await engine.start()
        print("serving", flush=True)
    except EngineDead as error:
        await engine.close()
        print("closed:", error, flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@contextmanager
def parent_of_an_engine(script: Path, model: Path, start_timeout_s: float) -> Iterator[subprocess.Popen[bytes]]:
    script.write_text(ORPHAN_SCRIPT)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script), str(model), str(start_timeout_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    ) as parent:
        try:
            yield parent
        finally:
            parent.kill()


@pytest.mark.parametrize("moment", ["the core is spawned", "its worker is spawned", "serving"])
def test_no_process_outlives_a_killed_parent(tiny_model: Path, tmp_path: Path, moment: str) -> None:
    """Not even one that imports vLLM, and has run none of our functions yet."""
    with parent_of_an_engine(tmp_path / "parent.py", tiny_model, START_S) as parent:
        if moment == "serving":
            assert said(parent) == "serving"
        else:
            wait_for_spawned(parent.pid, 1 if "core" in moment else 2)
        children = psutil.Process(parent.pid).children(recursive=True)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert children
        assert not psutil.wait_procs(children, timeout=GONE_S)[1]


def test_a_start_that_took_too_long_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with parent_of_an_engine(tmp_path / "parent.py", tiny_model, 12.0) as parent:
        assert said(parent) == "closed: vLLM did not start within 12 s"
        assert not [each for each in psutil.Process(parent.pid).children(recursive=True) if is_of_vllm(each)]


def said(parent: "subprocess.Popen[bytes]") -> str:
    """Among what vLLM says."""
    assert parent.stdout is not None
    lines = (line.decode().strip() for line in parent.stdout)
    return next(line for line in lines if line.startswith(("serving", "closed")))


def wait_for_spawned(parent: int, count: int) -> None:
    deadline = time.monotonic() + START_S
    while sum(is_of_vllm(each) for each in psutil.Process(parent).children(recursive=True)) < count:
        assert time.monotonic() < deadline, f"not {count} processes within {START_S:g} s"
        time.sleep(0.02)


def is_of_vllm(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline()) or "VLLM" in process.name()
    return False
