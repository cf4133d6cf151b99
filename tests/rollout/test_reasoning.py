"""Budgets of thinking and solution: over a scripted engine, and over the small one."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from databus.messages import Sampling
from rollout.config import ReasoningConfig, RolloutConfig
from rollout.engine.base import Completion, EngineStats, GenerateRequest, Snapshot, UpdateReport
from rollout.engine.end_tag import EndTag, end_tag
from rollout.engine.factory import make_engine
from rollout.engine.reasoning import ReasoningEngine, check_budgets
from rollout.groups_out import make_group

END, STOP = 2, 14  # the tiny model's <eos>, and "="
PROMPT = (6, 13, 8, 14)


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(97 + index) for index in ids)


def request(size: int = 1, max_tokens: int = 100, **changes: Any) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens)
    return GenerateRequest(group_id="g", prompt_ids=PROMPT, group_size=size, sampling=sampling, **changes)


class ScriptedEngine:
    """Says `thinking` first, `solution` after a prefix; `END` ends a script, else it goes on for ever."""

    def __init__(self, thinking: Sequence[int], solution: Sequence[int]) -> None:
        self.version = 3
        self.requests: list[GenerateRequest] = []
        self._scripts = (list(thinking), list(solution))

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def drain(self) -> None: ...

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        return UpdateReport(pause_s=0.5)

    def stats(self) -> EngineStats:
        return EngineStats(generated_tokens=7)

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        self.requests.append(request)
        script = self._scripts[bool(request.prefix)]
        endless = script if END in script else script + [9] * 1000
        whole = endless[: endless.index(END) + 1] if END in endless else endless
        tokens = np.array(whole[: request.sampling.max_tokens], np.int32)
        versions = np.full(len(tokens), self.version, np.int32)
        self.version += 1
        truncated = len(tokens) < len(whole)
        logprobs = np.full(len(tokens), -0.5, np.float32)
        return [Completion(token_ids=tokens, logprobs=logprobs, versions=versions, truncated=truncated)]


def config(thinking: int, solution: int, context: int = 1000) -> RolloutConfig:
    budgets = ReasoningConfig(thinking_tokens=thinking, solution_tokens=solution, end="fg")
    return RolloutConfig(engine="small", context_tokens=context, max_tokens=900, reasoning=budgets)


def complete(engine: ScriptedEngine, config: RolloutConfig, tag: Sequence[int], request: GenerateRequest) -> Completion:
    async def scenario() -> Completion:
        budgeted = ReasoningEngine(engine, config, "", lambda model, text: EndTag(decode(tag), tag, decode))
        await budgeted.start()
        (completion,) = await budgeted.generate(request)
        return completion

    return asyncio.run(scenario())


def scripted(
    thinking: Sequence[int], solution: Sequence[int], tag: Sequence[int] = (5, 6), budgets: tuple[int, int] = (4, 3)
) -> tuple[Completion, ScriptedEngine]:
    engine = ScriptedEngine(thinking, solution)
    return complete(engine, config(*budgets), tag, request()), engine


@pytest.mark.parametrize(
    ("thinking", "solution", "tokens", "forced", "truncated"),
    [
        ([7, 7, 7, 7, 7], [8, END], [7, 7, 7, 7, 5, 6, 8, END], [5, 6], False),  # thinking ran out
        ([7, 7, 7, 7, 7], [8, 8, 8, 8], [7, 7, 7, 7, 5, 6, 8, 8, 8], [5, 6], True),  # and the solution, too
        ([7, 7, 7, 5, 6], [8, END], [7, 7, 7, 5, 6, 8, END], [6], False),  # it had begun to end
        ([7, 5, 6, 8], [8, END], [7, 5, 6, 8, 8, END], [], False),  # it ended by itself
        ([7, 5, 6, 8], [8, 8, 8], [7, 5, 6, 8, 8, 8], [], True),  # the solution gets its whole budget
        ([7, 7, 5, 6], [8, 8, 8], [7, 7, 5, 6, 8, 8, 8], [], True),
        ([5, 6, 8, END], [], [5, 6, 8, END], [], False),
        ([7, 7, END], [], [7, 7, END], [], False),  # it never thought
        ([7, 7, 7, END], [], [7, 7, 7, END], [], False),
    ],
)
def test_budgets(thinking: list, solution: list, tokens: list, forced: list, truncated: bool) -> None:
    completion, engine = scripted(thinking, solution)
    assert completion.token_ids.tolist() == tokens
    assert completion.truncated == truncated
    mask = completion.sampled().astype(bool)
    assert completion.token_ids[~mask].tolist() == forced
    assert (completion.logprobs[~mask] == 0).all()
    assert (completion.logprobs[mask] == -0.5).all()
    assert (completion.loss_mask is None) == (not forced)
    if len(engine.requests) == 2:
        second = engine.requests[1]
        (seen,) = np.flatnonzero(np.diff(completion.versions)) + 1  # forced ones have what is served by then
        assert completion.versions.tolist() == [3] * seen + [4] * (len(tokens) - seen)
        assert list(second.prefix) == tokens[: len(second.prefix)]
        assert (second.group_id, second.prompt_ids, second.first_sample) == ("g", PROMPT, 0)


def test_a_solution_longer_than_its_budget_is_cut_where_thinking_left_room() -> None:
    completion, engine = scripted([7, 5, 6, 8, 8, 8, 8, END], [], budgets=(20, 2))
    assert completion.token_ids.tolist() == [7, 5, 6, 8, 8]
    assert completion.truncated
    assert len(engine.requests) == 1
    completion, _ = scripted([7, 5, 6, 8, END], [], budgets=(20, 2))
    assert not completion.truncated


def test_a_tag_of_one_token_is_found_by_its_id() -> None:
    completion, _ = scripted([7, 5, 8, 8], [9, END], tag=(5,))
    assert completion.token_ids.tolist() == [7, 5, 8, 8, 9], "of three tokens for the solution it had used two"
    completion, _ = scripted([7, 7, 8, 8], [9, END], tag=(5,))
    assert completion.token_ids.tolist() == [7, 7, 8, 8, 5, 9, END]


def test_a_tag_in_other_tokens_is_found_in_the_text() -> None:
    pieces = {5: "</", 6: "think>", 7: "x", 8: "y</", 9: "z"}
    tag = EndTag("</think>", (5, 6), lambda ids: "".join(pieces[index] for index in ids))
    assert tag.find(np.array([7, 8, 6, 7], np.int32)) == 3
    assert tag.find(np.array([7, 5, 6], np.int32)) == 3
    assert tag.find(np.array([7, 5, 7, 6], np.int32)) is None
    assert tag.find(np.array([], np.int32)) is None
    assert tag.missing(np.array([7, 5], np.int32)).tolist() == [6]
    assert tag.missing(np.array([], np.int32)).tolist() == [5, 6]
    with pytest.raises(ValueError, match="gives no tokens"):
        EndTag("x", (), decode)


scripts = st.lists(st.sampled_from([5, 6, 7, END]), max_size=12)


@settings(deadline=None)
@given(scripts, scripts, st.integers(1, 8), st.integers(1, 8), st.sampled_from([(5,), (5, 6), (5, 5, 6)]), st.data())
def test_no_budget_is_ever_exceeded(
    thinking: list[int], solution: list[int], budget: int, solution_budget: int, tag: tuple[int, ...], data: Any
) -> None:
    context = data.draw(st.integers(len(PROMPT) + 1, 40))
    engine = ScriptedEngine(thinking, solution)
    completion = complete(engine, config(budget, solution_budget, context), tag, request())
    tokens = completion.token_ids.tolist()
    end = EndTag(decode(tag), tag, decode).find(completion.token_ids)
    assert len(tokens) <= context - len(PROMPT)
    assert 0 < len(tokens) <= budget + len(tag) + solution_budget
    assert (end or 0) <= budget + len(tag)
    if end is not None:
        assert len(tokens) - end <= solution_budget
    assert END not in tokens[:-1]
    assert (tokens[-1] == END) != completion.truncated
    for name in ("logprobs", "versions"):
        assert len(getattr(completion, name)) == len(tokens)
    forced = completion.token_ids[completion.sampled() == 0].tolist()
    assert forced == list(tag[len(tag) - len(forced) :])
    for each in engine.requests:  # an engine is never asked for more than fits
        assert len(PROMPT) + len(each.prefix) + each.sampling.max_tokens <= context or each.sampling.max_tokens == 1


def test_a_long_prompt_takes_from_thinking_not_from_the_solution() -> None:
    engine = ScriptedEngine([7] * 50, [8] * 50)
    completion = complete(engine, config(20, 10, context=len(PROMPT) + 17), (5, 6), request())
    assert completion.token_ids.tolist() == [7] * 5 + [5, 6] + [8] * 10


def test_siblings_do_not_wait_for_each_other() -> None:
    class OneThinksLong(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> list[Completion]:
            if request.first_sample == 0 and not request.prefix:
                await self.others_done.wait()
            completions = await super().generate(request)
            if sum(bool(each.prefix) for each in self.requests) == 2:
                self.others_done.set()
            return completions

    async def scenario() -> list[Completion]:
        engine = OneThinksLong([7] * 9, [8, END])
        engine.others_done = asyncio.Event()
        budgeted = ReasoningEngine(engine, config(4, 3), "", lambda *_: EndTag("fg", (5, 6), decode))
        await budgeted.start()
        return await asyncio.wait_for(budgeted.generate(request(size=3)), 5)

    assert len(asyncio.run(scenario())) == 3


def test_settings_without_room_are_one_line() -> None:
    budgets = ReasoningConfig(thinking_tokens=100, solution_tokens=50)
    check_budgets(budgets, 3, "rollout.max_tokens", 153)
    with pytest.raises(ValueError, match=r"rollout.max_tokens is 152, but thinking \(100\), its end '</think>' \(3\)"):
        check_budgets(budgets, 3, "rollout.max_tokens", 152)
    check_budgets(ReasoningConfig(), 3, "rollout.max_tokens", 1)
    with pytest.raises(ValueError, match=r"rollout.max_tokens is 10,"):
        complete(ScriptedEngine([], []), msgspec.structs.replace(config(8, 8), max_tokens=10), (5, 6), request())


# ---------------------------------------------------------------- the small engine

SMALL = RolloutConfig(
    engine="small",
    context_tokens=200,
    max_tokens=100,
    reasoning=ReasoningConfig(thinking_tokens=12, solution_tokens=20, end="=;"),
)
PLAIN = msgspec.structs.replace(SMALL, reasoning=ReasoningConfig())


def generate(model: Path, config: RolloutConfig, *requests: GenerateRequest) -> list[list[Completion]]:
    async def scenario() -> list[list[Completion]]:
        engine = make_engine(config, str(model), seed=1, version=2)
        await engine.start()
        try:
            return await asyncio.gather(*map(engine.generate, requests))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(scenario(), 60))


def test_the_tiny_models_tag(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(end_tag(tokenizer, "=;")) == 2
    with pytest.raises(ValueError, match=r"rollout.reasoning.end is '</think>', which the tokenizer cannot write"):
        end_tag(tokenizer, "</think>")


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_what_is_sampled_is_sampled_as_without_budgets(
    tiny_model: Path, tiny_weights: dict, reference: Callable, temperature: float
) -> None:
    """The small engine's noise is fixed by place: up to the forced tag all must be the same, token for token."""
    asked = request(size=12)
    asked = replace(asked, sampling=Sampling(max_tokens=100, temperature=temperature))
    (completions,) = generate(tiny_model, SMALL, asked)
    singles = [replace(asked, group_size=1, first_sample=index) for index in range(12)]
    plain = [group[0] for group in generate(tiny_model, PLAIN, *singles)]
    forced = [completion for completion in completions if completion.loss_mask is not None]
    assert forced and len(forced) <= len(completions)
    for completion, free in zip(completions, plain, strict=True):
        sampled = completion.sampled().astype(bool)
        same = len(sampled) if sampled.all() else int(np.argmin(sampled))
        assert completion.token_ids[:same].tolist() == free.token_ids[:same].tolist()
        expected = reference(tiny_weights, PROMPT, completion, temperature)
        np.testing.assert_allclose(completion.logprobs[sampled], expected[sampled], atol=1e-5)
        assert (completion.versions == 2).all()
        assert completion.truncated == (completion.token_ids[-1] != END)
        if not sampled.all():
            assert completion.token_ids[~sampled].tolist() in ([14, 15], [15])


def test_a_group_asked_for_in_parts_is_the_same_group(tiny_model: Path) -> None:
    (whole,) = generate(tiny_model, PLAIN, request(size=1, max_tokens=30, first_sample=5))
    tokens = whole[0].token_ids
    (rest,) = generate(tiny_model, PLAIN, request(max_tokens=30, first_sample=5, prefix=tuple(tokens[:4].tolist())))
    assert rest[0].token_ids[: len(tokens) - 4].tolist() == tokens[4:].tolist()


def test_the_mask_reaches_the_group(tiny_model: Path) -> None:
    (completions,) = generate(tiny_model, SMALL, request(size=6))
    group = make_group(PROMPT, completions, [{"reward": 1.0}] * 6, ["reward"])
    masks = np.split(group.loss_mask, np.cumsum(group.lengths)[:-1])
    assert not group.loss_mask.all()
    for completion, mask in zip(completions, masks, strict=True):
        assert mask.tolist() == completion.sampled().tolist()
    assert (group.logprobs[group.loss_mask == 0] == 0).all()
