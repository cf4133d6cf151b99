"""What else must hold of a real engine that drafts: log-probabilities, versions, updates in flight, ends, counters."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from enumerable import CONFIG, END, NUM_TOKENS, PROMPT, Drafting, past_of
from msgspec import structs

from databus.messages import Probe, Sampling
from rollout.engine.base import Completion, GateRefused, GenerateRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOLERANCE = 1e-4
REPETITIVE = [[0, 1, 2, 3, 4] * 12, [4, 4, 3, 3] * 15]

Weights = dict[str, torch.Tensor]


def request(
    group_id: str, size: int = 32, tokens: int = 50, temperature: float = 1.0, problem: int = 0, history: Any = ()
) -> GenerateRequest:
    return GenerateRequest(
        group_id=group_id,
        prompt_ids=PROMPT,
        group_size=size,
        sampling=Sampling(max_tokens=tokens, temperature=temperature),
        problem=problem,
        history=history,
    )


@torch.no_grad()
def reference(model: Any, weights: Weights | None, completion: Completion, temperature: float) -> np.ndarray:
    """Log-probabilities [t] of a completion, in one forward pass of transformers, in fp32."""
    ids = torch.tensor([[*PROMPT, *completion.token_ids.tolist()]])
    logits = torch.func.functional_call(model, weights or {}, (ids,)).logits[0]
    scaled = torch.log_softmax(logits / (temperature or 1.0), -1)
    start = len(PROMPT)
    return scaled[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_the_sampling_distribution(
    drafting: Drafting, enumerable: Any, temperature: float
) -> None:
    drafting.draft_with("PrefixDrafter")
    completions: list[Completion] = []
    for turn in range(2):  # the second group drafts from the first one's completions
        group = request(f"t{temperature} {turn}", temperature=temperature, history=past_of(REPETITIVE), problem=5)
        completions += drafting.run(drafting.engine.generate(group))
    stats = drafting.engine.stats()
    assert 10 < stats.drafting["accepted"] < stats.drafting["drafted"]
    for completion in completions:
        expected = reference(enumerable, None, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=TOLERANCE)
        assert (completion.versions == drafting.engine.version).all()
        assert completion.truncated == (completion.token_ids[-1] != END)
        assert (completion.token_ids[:-1] != END).all()


def test_greedy_completions_do_not_depend_on_drafts(drafting: Drafting) -> None:
    drawn = []
    for problem, history in ((1, ()), (2, past_of(REPETITIVE)), (3, past_of([[END]] * 3))):
        drafting.draft_with("PrefixDrafter")
        group = request(f"greedy{problem}", 4, temperature=0.0, problem=problem, history=history)
        drawn += [tuple(each.token_ids.tolist()) for each in drafting.run(drafting.engine.generate(group))]
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("kv", ["keep", "recompute"])
def test_updates_in_flight_switch_at_a_token(
    drafting: Drafting, enumerable: Any, make_snapshot: Callable, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Drafts made under one version are verified by the next one's weights, and carry its number; a version that the
    mismatch gate refuses, with requests in flight and drafts made for them, leaves nothing behind."""
    drafting.draft_with("PrefixDrafter")
    engine = drafting.engine
    update = structs.replace(CONFIG.update, kv=kv)
    monkeypatch.setattr(engine, "_config", structs.replace(CONFIG, update=update))
    first = engine.version
    history: dict[int, Weights] = {first: dict(enumerable.named_parameters())}
    for version in range(first + 1, first + 5):
        history[version] = other_weights(enumerable, version)
    finished: list[Completion] = []

    async def keep_busy(lane: int) -> None:
        turn = 0
        while engine.version < max(history):
            finished.extend(await engine.generate(request(f"busy{kv}{lane}.{turn}", problem=9)))
            turn += 1

    async def scenario() -> None:
        lanes = [asyncio.ensure_future(keep_busy(lane)) for lane in range(4)]
        for version in sorted(history)[1:]:
            goal = len(finished) + 64
            while len(finished) < goal:
                await asyncio.sleep(0.01)
            probe = probe_of(enumerable, history[version])
            with pytest.raises(GateRefused):
                await engine.update(make_snapshot(other_weights(enumerable, 99), version, probe))
            snapshot = make_snapshot(history[version], version, probe)
            report = await engine.update(snapshot)
            snapshot.close()
            assert report.mismatch is not None and report.mismatch.kl < 1e-8
        await asyncio.gather(*lanes)

    async def put_back() -> None:
        """The engine is the other tests' too."""
        snapshot = make_snapshot(history[first], max(history) + 1)
        await engine.update(snapshot)
        snapshot.close()

    try:
        drafting.run(scenario())
    finally:
        drafting.run(put_back())
    mixed = 0
    for completion in finished:
        assert (np.diff(completion.versions) >= 0).all()
        versions = np.unique(completion.versions)
        for version in versions[:1] if kv == "keep" else versions:
            of_it = completion.versions == version
            expected = reference(enumerable, history[int(version)], completion, 1.0)
            np.testing.assert_allclose(completion.logprobs[of_it], expected[of_it], atol=TOLERANCE)
        if len(versions) > 1:  # tokens after the switch are no longer the old weights'
            mixed += 1
            switch = int((completion.versions == versions[0]).sum())
            expected = reference(enumerable, history[int(versions[0])], completion, 1.0)
            assert abs(expected[switch] - completion.logprobs[switch]) > 1e-6
    assert mixed > 10
    assert engine.stats().drafting["accepted"] > 100


@torch.no_grad()
def probe_of(model: Any, weights: Weights) -> Probe:
    text = tuple((index * 3 + index // 4) % END for index in range(40))
    ids = torch.tensor([text])
    logprobs = torch.log_softmax(torch.func.functional_call(model, weights, (ids,)).logits[0, :-1], -1)
    return Probe(sequences=(text,), logprobs=(tuple(logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()),))


def other_weights(model: Any, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).detach()
        for name, tensor in model.named_parameters()
    }


def test_a_drafter_that_raises_costs_no_rollout(drafting: Drafting) -> None:
    drafting.draft_with("RaisingDrafter")
    completions = drafting.run(drafting.engine.generate(request("raises", problem=5, size=64)))
    assert len(completions) == 64
    stats = drafting.engine.stats()
    assert stats.drafting["failures"] == 1
    assert stats.drafting["drafted"] > 0


def test_bad_histories_cost_no_rollout(drafting: Drafting) -> None:
    drafting.draft_with("PrefixDrafter")
    for index, history in enumerate([past_of([[NUM_TOKENS]]), past_of([[2**31 - 1]]), past_of([[-5, 1]])]):
        completions = drafting.run(drafting.engine.generate(request(f"bad{index}", 4, history=history)))
        assert len(completions) == 4
    assert drafting.engine.stats().drafting["refused"] == 3
    assert drafting.engine.stats().drafting["failures"] == 0


def test_drafts_end_with_the_request_and_the_context(drafting: Drafting) -> None:
    """One request at the end of its context keeps no other from drafting, as it does in vLLM 0.32.0 by itself."""
    drafting.draft_with("PrefixDrafter")
    endless = past_of([[0, 1, 2, 3, 4] * 20])
    room = CONFIG.context_tokens - len(PROMPT)
    lengths = set()
    for tokens in (1, 2, 3, 7, room, room + 9):
        completions = drafting.run(
            drafting.engine.generate(request(f"end{tokens}", 64, tokens, temperature=2.0, history=endless))
        )
        truncated = [len(each.token_ids) for each in completions if each.truncated]
        assert set(truncated) <= {min(tokens, room)}
        lengths |= set(truncated)
    assert {1, 2, 3, 7} <= lengths


def test_cancelled_requests_leave_the_drafter(drafting: Drafting) -> None:
    drafting.draft_with("PrefixDrafter")

    async def scenario() -> None:
        for turn in range(4):
            endless = asyncio.ensure_future(drafting.engine.generate(request(f"cancel{turn}", CONFIG.max_sequences)))
            await asyncio.sleep(0.05)
            endless.cancel()
            await asyncio.gather(endless, return_exceptions=True)
        await drafting.engine.generate(request("after", CONFIG.max_sequences))

    drafting.run(scenario())
    assert drafting.engine.stats().drafting["refused"] == 0
    assert drafting.engine.stats().drafting["failures"] == 0
