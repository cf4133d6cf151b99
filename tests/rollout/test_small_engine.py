import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.stats
import torch
from architectures import CONFIGS, write_model
from scenarios import run, same
from transformers import AutoModelForCausalLM

from databus.messages import Probe, Sampling
from rollout.config import GateConfig, RolloutConfig, UpdateConfig
from rollout.engine.base import Completion, Engine, EngineDead, EngineError, GateRefused, GenerateRequest, UpdateFailed
from rollout.engine.factory import make_engine
from rollout.folder_weights import snapshot_of

CONFIG = RolloutConfig(engine="small", context_tokens=200)
PROMPT = (6, 13, 8, 14)


@asynccontextmanager
async def engine(model: Path, version: int = 0, **settings: Any) -> AsyncIterator[Engine]:
    engine = make_engine(msgspec.structs.replace(CONFIG, **settings), str(model), seed=1, version=version)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(
    group_id: str = "a", size: int = 4, tokens: int = 24, temperature: float = 1.0, cursor: int = 0
) -> GenerateRequest:
    sampling = Sampling(max_tokens=tokens, temperature=temperature)
    return GenerateRequest(group_id=group_id, prompt_ids=PROMPT, group_size=size, sampling=sampling, cursor=cursor)


def test_results_depend_neither_on_concurrency_nor_on_the_lease(tiny_model: Path) -> None:
    async def alone() -> list[list[Completion]]:
        async with engine(tiny_model) as small:
            return [await small.generate(request(cursor=cursor)) for cursor in range(3)]

    async def together() -> list[list[Completion]]:
        async with engine(tiny_model) as small:
            others = [small.generate(request(f"x{index}", size=3)) for index in range(3)]
            groups = [small.generate(request("again", cursor=cursor)) for cursor in (2, 1, 0)]
            return (await asyncio.gather(*groups, *others))[2::-1]

    first, second = run(alone()), run(together())
    assert all(same(left, right) for left, right in zip(first, second, strict=True))
    assert not same(first[0], first[1]), "groups draw noise of their own"
    assert len({tuple(completion.token_ids) for completion in first[0]}) > 1, "so do samples"


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_sampling_distribution(
    tiny_model: Path, tiny_weights: dict, reference: Callable, temperature: float
) -> None:
    async def scenario() -> list[Completion]:
        async with engine(tiny_model) as small:
            return await small.generate(request(temperature=temperature, tokens=60, size=8))

    completions = run(scenario())
    for completion in completions:
        expected = reference(tiny_weights, PROMPT, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)
        assert completion.truncated == (completion.token_ids[-1] != 2)
        assert (completion.token_ids[:-1] != 2).all()
    if temperature == 0.0:
        assert len({tuple(completion.token_ids) for completion in completions}) == 1


@torch.no_grad()
def test_tokens_are_drawn_from_the_models_distribution(tiny_model: Path) -> None:
    """The first two tokens of 4,000 samples, against the exact probabilities; the seed is fixed."""

    async def scenario() -> list[Completion]:
        async with engine(tiny_model) as small:
            return await small.generate(request(size=4000, tokens=2))

    drawn = [completion.token_ids for completion in run(scenario()) if len(completion.token_ids) == 2]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    logits = model(torch.tensor([[*PROMPT, first] for first in range(32)])).logits
    chances = (logits[:, 3].softmax(-1).diagonal()[:, None] * logits[:, 4].softmax(-1)).double().numpy()
    chances[2] = 0.0  # an end token has no successor
    for axis, position in ((1, 0), (0, 1)):
        expected = chances.sum(axis) / chances.sum() * len(drawn)
        seen = np.bincount([tokens[position] for tokens in drawn], minlength=32)
        frequent = expected > 5
        assert (
            scipy.stats.chi2.sf((((seen - expected) ** 2)[frequent] / expected[frequent]).sum(), frequent.sum()) > 1e-3
        )


def test_update_in_flight_switches_at_a_token(
    tiny_model: Path, tiny_weights: dict, other_weights: Callable, make_snapshot: Callable, reference: Callable
) -> None:
    new = other_weights(1)

    async def scenario() -> tuple[list[Completion], list[Completion], float]:
        async with engine(tiny_model, version=3, context_tokens=10_000) as small:
            flying = asyncio.ensure_future(small.generate(request(size=32, tokens=150)))
            while small.stats().generated_tokens < 100:
                await asyncio.sleep(0.001)
            snapshot = make_snapshot(new, 4)
            report = await small.update(snapshot)
            snapshot.close()
            assert small.version == 4
            return await flying, await small.generate(request("b")), report.pause_s

    flying, later, pause_s = run(scenario())
    assert pause_s > 0
    long = max(flying, key=lambda completion: len(completion.token_ids))
    switch = int((long.versions == 3).sum())
    assert 0 < switch < len(long.versions)
    for completion in flying:
        assert (completion.versions[:switch] == 3).all()
        assert (completion.versions[switch:] == 4).all()
        expected = reference(tiny_weights, PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs[:switch], expected[:switch], atol=1e-5)
    after = reference(tiny_weights, PROMPT, long, 1.0)[switch:]
    assert np.abs(after - long.logprobs[switch:]).max() > 1e-3, "the new weights are in use"
    for completion in later:
        assert (completion.versions == 4).all()
        np.testing.assert_allclose(completion.logprobs, reference(new, PROMPT, completion, 1.0), atol=1e-5)


@pytest.mark.parametrize("kv", ["recompute", "drain"])
def test_tokens_are_of_their_versions_weights_alone(
    tiny_model: Path, tiny_weights: dict, other_weights: Callable, make_snapshot: Callable, reference: Callable, kv: Any
) -> None:
    new = other_weights(1)

    async def scenario() -> tuple[list[Completion], list[Completion]]:
        async with engine(tiny_model, update=UpdateConfig(kv=kv)) as small:
            flying = asyncio.ensure_future(small.generate(request(size=16, tokens=60)))
            while small.stats().generated_tokens < 100:
                await asyncio.sleep(0.001)
            snapshot = make_snapshot(new, 1)
            await small.drain()
            waiting = asyncio.ensure_future(small.generate(request("b")))
            await asyncio.sleep(0.05)
            await small.update(snapshot)
            snapshot.close()
            return await flying, await waiting

    flying, waiting = run(scenario())
    versions = {int(version) for completion in flying for version in completion.versions}
    assert versions == ({0, 1} if kv == "recompute" else {0})
    if kv == "drain":
        assert all((completion.versions == 1).all() for completion in waiting)
    for completion in [*flying, *waiting]:
        for version, weights in enumerate((tiny_weights, new)):
            of_it = completion.versions == version
            expected = reference(weights, PROMPT, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs[of_it], expected[of_it], atol=1e-5)


def test_bad_snapshots_change_nothing(tiny_model: Path, other_weights: Callable, make_snapshot: Callable) -> None:
    good = other_weights(1)
    names = list(good)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({name: good[name] for name in names[:-1]}, r"'.*' is missing \(1 in all\)"),
        (good | {"extra": torch.zeros(1)}, "unknown tensor 'extra'"),
        (good | {names[-1]: torch.zeros(3)}, r"is \(3,\), the model's is"),
        (good | {names[0]: good[names[0]].double()}, "has dtype 'float64'"),
    ]

    async def scenario() -> None:
        async with engine(tiny_model) as small:
            before = await small.generate(request())
            for weights, says in cases:
                with pytest.raises(UpdateFailed, match=says):
                    await small.update(make_snapshot(weights, 1))
            snapshot = make_snapshot(good, 1)
            os.pwrite(snapshot.fd, b"\x55", 1000)
            with pytest.raises(UpdateFailed, match="does not match its checksum"):
                await small.update(snapshot)
            assert small.version == 0
            assert same(before, await small.generate(request()))
            await small.update(make_snapshot(good, 1))
            assert not same(before, await small.generate(request()))

    run(scenario())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_versions_of_every_architecture_are_taken_up(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """And given up again. The tensors of a mixture's experts are fewer in transformers than in a checkpoint."""
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, folder in enumerate((old, new)):
        write_model(name, shutil.copytree(tiny_model, folder), seed)

    async def says(folder: Path) -> list[Completion]:
        async with engine(folder, context_tokens=60) as small:
            return await small.generate(request())

    async def scenario() -> list[list[Completion]]:
        whole = snapshot_of(new, 1, "float32")
        unlike = Probe(sequences=((3, 4),), logprobs=((-99.0,),))
        async with engine(old, context_tokens=60) as small:
            with pytest.raises(GateRefused):
                await small.update(replace(whole, manifest=msgspec.structs.replace(whole.manifest, probe=unlike)))
            before = await small.generate(request())
            await small.update(whole)
            whole.close()
            return [before, await small.generate(request())]

    before, after = run(scenario())
    assert same(before, run(says(old)))
    assert same(after, run(says(new)))
    assert not same(before, after)


def test_a_version_that_is_not_what_the_learner_scored_is_refused(
    tiny_model: Path, tiny_weights: dict, other_weights: Callable, make_snapshot: Callable, make_probe: Callable
) -> None:
    new = other_weights(1)
    probe = make_probe(new)
    unscorable = Probe(sequences=((1, 1000),), logprobs=((-1.0,),))

    async def scenario() -> None:
        async with engine(tiny_model) as small:
            before = await small.generate(request())
            with pytest.raises(GateRefused, match=r"version 1 refused: mismatch gate: .* KL \S+ nats a token") as error:
                await small.update(make_snapshot(new, 1, make_probe(tiny_weights)))
            assert error.value.mismatch.difference > 0.1
            for wrong in (unscorable, msgspec.structs.replace(probe, logprobs=probe.logprobs[1:])):
                with pytest.raises(UpdateFailed, match="version 1 refused: its probe cannot be scored"):
                    await small.update(make_snapshot(new, 1, wrong))
            assert small.version == 0
            assert same(before, await small.generate(request()))
            report = await small.update(make_snapshot(new, 1, probe))
            assert report.mismatch is not None and report.mismatch.kl < 1e-9
            assert small.version == 1
            assert not same(before, await small.generate(request()))

    run(scenario())


def test_without_a_gate_every_version_passes(
    tiny_model: Path, tiny_weights: dict, other_weights: Callable, make_snapshot: Callable, make_probe: Callable
) -> None:
    async def scenario() -> None:
        async with engine(tiny_model, gate=GateConfig(max_kl=0)) as small:
            report = await small.update(make_snapshot(other_weights(1), 1, make_probe(tiny_weights)))
            assert report.mismatch is None
            assert small.version == 1

    run(scenario())


def test_cancelling_ends_a_group(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with engine(tiny_model, context_tokens=100_000) as small:
            endless = asyncio.ensure_future(small.generate(request("endless", size=64, tokens=90_000)))
            while not small.stats().generated_tokens:
                await asyncio.sleep(0.001)
            assert small.stats().running_sequences == 64
            endless.cancel()
            await small.generate(request())
            assert small.stats().running_sequences == 0

    run(scenario())


def test_errors(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with engine(tiny_model, context_tokens=4) as small:
            with pytest.raises(EngineError, match="prompt of 4 tokens, context of 4"):
                await small.generate(request())
            too_large = replace(request(), prompt_ids=(1000,))
            with pytest.raises(EngineError, match="IndexError"):
                await small.generate(too_large)
            assert len(await small.generate(replace(request(), prompt_ids=(6,)))) == 4
        with pytest.raises(EngineDead):
            await small.generate(replace(request(), prompt_ids=(6,)))

    run(scenario())


def test_context_bounds_the_completion(tiny_model: Path) -> None:
    async def scenario() -> list[Completion]:
        async with engine(tiny_model, context_tokens=6) as small:
            return await small.generate(request(size=16, tokens=50))

    completions = run(scenario())
    assert max(len(completion.token_ids) for completion in completions) == 2
    assert any(completion.truncated for completion in completions)
