"""Episodes of several turns: over a scripted engine, and over the small one."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from databus.groups import Group, decode_group
from databus.messages import Completed, Failed, Lease, Sampling
from rewards.errors import RewardError
from rewards.sample import Sample
from rollout.config import EnvironmentConfig, ReasoningConfig, RolloutConfig
from rollout.engine.base import Completion, Engine, EngineError, EngineStats, GenerateRequest, Snapshot, UpdateReport
from rollout.engine.factory import make_engine
from rollout.environments.base import Step
from rollout.environments.turn_tokens import TurnTokens
from rollout.episodes import Episode, Episodes
from rollout.lease_work import LeaseWork

END = 2  # the tiny model's <eos>
PROMPT = (6, 13, 8, 14)
PLAIN = EnvironmentConfig(name="test", before=";", after="=", output_tokens=8)
SEMICOLON, EQUALS = 15, 14


def request(size: int = 1, max_tokens: int = 100, **changes: Any) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens)
    return GenerateRequest(group_id="g", prompt_ids=PROMPT, group_size=size, sampling=sampling, **changes)


class ScriptedEngine:
    """Says one script a turn; every turn is of another version, every token of another log-probability."""

    def __init__(self, *scripts: Sequence[int]) -> None:
        self.version = 3
        self.requests: list[GenerateRequest] = []
        self.said: list[Completion] = []
        self._scripts = [list(script) for script in scripts]

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def drain(self) -> None: ...

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        return UpdateReport(pause_s=0.5)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        whole = self._scripts[len(self.requests) % len(self._scripts)]
        self.requests.append(request)
        tokens = np.array(whole[: request.sampling.max_tokens], np.int32)
        number = sum(len(each.token_ids) for each in self.said)
        self.said.append(
            Completion(
                token_ids=tokens,
                logprobs=-np.arange(number + 1, number + 1 + len(tokens), dtype=np.float32),
                versions=np.full(len(tokens), self.version, np.int32),
                truncated=len(tokens) < len(whole) or whole[-1] != END,
            )
        )
        self.version += 1
        return self.said[-1:]


class Answers:
    """An environment that gives these answers, and is done when it has no more; the state is how many it has given."""

    def __init__(self, *answers: str | Exception, parts: dict[str, float] | None = None) -> None:
        self.answers = answers
        self.turns: list[str] = []
        self._parts = parts or {}

    async def reset(self, problem: dict[str, Any]) -> int:
        return int(problem.get("from", 0))

    async def step(self, state: int, turn: str) -> Step:
        self.turns.append(turn)
        if state >= len(self.answers):
            return Step(done=True, parts=self._parts)
        answer = self.answers[state]
        if isinstance(answer, Exception):
            raise answer
        return Step(output=answer, state=state + 1, parts=self._parts, tool_calls=1)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def episodes_of(
    engine: Engine, answers: Any, tokenizer: Any, config: EnvironmentConfig = PLAIN, context: int = 1000
) -> Episodes:
    def detokenize(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return Episodes(engine, answers, TurnTokens(tokenizer, config), detokenize, config, context)


def play(episodes: Episodes, asked: GenerateRequest, **problem: Any) -> list[Episode]:
    return asyncio.run(episodes.play(asked, problem))


def digits(text: str) -> list[int]:
    return [3 + "0123456789+=;#".index(letter) for letter in text]


def test_a_transcript_is_turns_and_answers(tokenizer: Any) -> None:
    engine = ScriptedEngine([3, 4, END], [5, END], [6, 7, END])
    answers = Answers("12", "3", parts={"turn": 1.0})
    episodes = episodes_of(engine, answers, tokenizer)
    (episode,) = play(episodes, request(predicted_tokens=9))
    said = episode.completion
    forced = ([SEMICOLON, *digits("12"), EQUALS], [SEMICOLON, *digits("3"), EQUALS])
    assert said.token_ids.tolist() == [3, 4, END, *forced[0], 5, END, *forced[1], 6, 7, END]
    assert said.sampled().tolist() == [1] * 3 + [0] * 4 + [1] * 2 + [0] * 3 + [1] * 3
    assert said.versions.tolist() == [3] * 3 + [4] * 4 + [4] * 2 + [5] * 3 + [5] * 3
    assert said.logprobs.tolist() == [-1, -2, -3, 0, 0, 0, 0, -4, -5, 0, 0, 0, -6, -7, -8]
    assert not said.truncated
    assert [(m.role, m.text) for m in episode.transcript] == [
        ("assistant", "01"), ("tool", "12"), ("assistant", "2"), ("tool", "3"), ("assistant", "34"),
    ]  # fmt: skip
    assert episode.parts == {"turn": 3.0}
    assert [each.prefix for each in engine.requests] == [(), tuple(said.token_ids[:7]), tuple(said.token_ids[:12])]
    assert [each.predicted_tokens for each in engine.requests] == [9, 2, 1]
    counted = {name: value for name, value in episodes.counters.items() if name != "tool_s"}
    assert counted == {"episodes": 1, "turns": 3, "truncated": 0, "tool_calls": 2, "tool_errors": 0}


scripts = st.lists(st.lists(st.integers(3, 16), max_size=6).map(lambda script: [*script, END]), min_size=1, max_size=5)
outputs = st.lists(st.one_of(st.text(), st.sampled_from(["", "<eos>", "<pad>1", "0" * 100_000])), max_size=5)


@settings(deadline=None)
@given(scripts, outputs, st.integers(1, 60), st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_what_was_sampled_is_what_is_trained(
    tokenizer: Any,
    scripts: list[list[int]],
    outputs: list[str],
    max_tokens: int,
    turn_tokens: int,
    max_turns: int,
    bare: bool,
) -> None:
    """The property of the whole thing: whatever tools say, the tokens that bear loss are the engine's, in its order."""
    before, after = ("<eos>", "") if bare else (";", "=")
    config = EnvironmentConfig(
        name="t", before=before, after=after, output_tokens=4, turn_tokens=turn_tokens, max_turns=max_turns
    )
    engine = ScriptedEngine(*scripts)
    (episode,) = play(episodes_of(engine, Answers(*outputs), tokenizer, config), request(max_tokens=max_tokens))
    completion, sampled = episode.completion, episode.completion.sampled().astype(bool)
    for name in ("token_ids", "logprobs", "versions"):
        engines_own = np.concatenate([getattr(said, name) for said in engine.said])
        assert getattr(completion, name)[sampled].tolist() == engines_own.tolist()
    assert 0 < len(completion.token_ids) <= max_tokens
    assert sampled[-1], "it does not end with what nobody went on from"
    assert not set(completion.token_ids[~sampled]) & {0, 1, END}, "an answer ends nothing"
    assert (completion.logprobs[~sampled] == 0).all()
    assert (np.diff(completion.versions) >= 0).all()
    assert len(engine.requests) <= max_turns
    for each, said in zip(engine.requests, engine.said, strict=True):
        seen = [*each.prefix, *said.token_ids.tolist()]
        assert seen == completion.token_ids[: len(seen)].tolist(), "each turn goes on from the very tokens"
        assert len(said.token_ids) <= (turn_tokens or max_tokens)
    finished = len(engine.said) > len(outputs) and not engine.said[-1].truncated
    assert completion.truncated == (not finished)


@pytest.mark.parametrize(
    ("changes", "max_tokens", "context", "tokens"),
    [
        ({"max_turns": 1}, 100, 1000, 3),
        ({"turn_tokens": 2}, 100, 1000, 2),
        ({}, 7, 1000, 3),  # turn and answer are as many: the answer is left out, as nothing could follow
        ({}, 8, 1000, 8),
        ({}, 100, len(PROMPT) + 7, 3),  # the context says the same
        ({"episode_s": 1e-9}, 100, 1000, 3),
    ],
)
def test_limits(tokenizer: Any, changes: dict, max_tokens: int, context: int, tokens: int) -> None:
    config = EnvironmentConfig(name="t", before=";", after="=", **changes)
    episodes = episodes_of(ScriptedEngine([3, 4, END]), Answers("12", "12"), tokenizer, config, context)
    (episode,) = play(episodes, request(max_tokens=max_tokens))
    assert len(episode.completion.token_ids) == tokens
    assert episode.completion.truncated
    assert episodes.counters["truncated"] == 1


def test_history_goes_with_the_first_alone(tokenizer: Any) -> None:
    engine = ScriptedEngine([END])
    play(episodes_of(engine, Answers(), tokenizer), request(size=3, history=((1, np.arange(3)),), history_ids=(5,)))
    assert [(each.first_sample, len(each.history)) for each in engine.requests] == [(0, 1), (1, 0), (2, 0)]


def test_a_tool_that_is_slow_holds_up_its_own_episode_alone(tokenizer: Any) -> None:
    class Slow(Answers):
        async def step(self, state: int, turn: str) -> Step:
            if not self.turns:
                self.turns.append(turn)
                await released.wait()
                return Step(done=True)
            if len(self.turns) == 4:
                released.set()
            return await super().step(state, turn)

    released = asyncio.Event()
    episodes = episodes_of(ScriptedEngine([3, END]), Slow("1"), tokenizer)
    assert len(play(episodes, request(size=3))) == 3


# ------------------------------------------------------------ in a lease


class Scorer:
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    async def score(self, samples: list[Sample]) -> list[dict[str, float]]:
        self.samples += samples
        return [{"right": 1.0, "both": 1.0} for _ in samples]


def run_lease(engine: Engine, answers: Any, tokenizer: Any, scorer: Scorer) -> tuple[Any, Group | None]:
    episodes = episodes_of(engine, answers, tokenizer)
    work = LeaseWork(engine, scorer, episodes._detokenize, episodes=episodes)
    lease = Lease(
        group_id="g", cursor=0, attempt=0, purpose="train", prompt="3+5=", prompt_ids=PROMPT,
        problem=json.dumps({"answer": "8"}).encode(), group_size=2, sampling=Sampling(max_tokens=60), lease_s=60.0,
    )  # fmt: skip
    freed: list[bool] = []
    message, frames = asyncio.run(work.run(lease, lambda: freed.append(True)))
    assert freed == [True]
    return message, decode_group(message.columns, frames) if isinstance(message, Completed) else None


def test_the_reward_sees_the_transcript_and_the_environments_parts_are_added(tokenizer: Any) -> None:
    scorer = Scorer()
    engine = ScriptedEngine([3, END], [4, END], [5, END], [6, END])
    message, group = run_lease(engine, Answers("1", parts={"both": 0.25, "turns": 0.5}), tokenizer, scorer)
    assert message.reward_names == ("right", "both", "turns")
    assert group is not None
    assert group.reward_parts.tolist() == [[1.0, 1.5, 1.0]] * 2
    assert group.rewards.tolist() == [3.5, 3.5]
    sample = scorer.samples[0]
    assert [each.role for each in sample.transcript] == ["assistant", "tool", "assistant"]
    assert sample.completion == sample.transcript[-1].text, "what a reward compares is the model's, not a tool's"
    assert (sample.num_tokens, sample.truncated) == (7, False)
    assert sample.environment == {"both": 0.5, "turns": 1.0}
    assert group.loss_mask.tolist() == [1, 1, 0, 0, 0, 1, 1] * 2
    assert (group.oldest_loss_version(), group.loss_versions) == (3, (3, 6))


@pytest.mark.parametrize("parts", [{"x": 3e38, "y": 3e38}, {"right": float("inf")}])
def test_parts_that_are_too_large_fail_the_group(tokenizer: Any, parts: dict) -> None:
    message, _ = run_lease(ScriptedEngine([3, END]), Answers(parts=parts), tokenizer, Scorer())
    assert isinstance(message, Failed) and message.cause == "reward"


def test_an_environment_that_fails_fails_its_group_alone(tokenizer: Any) -> None:
    message, _ = run_lease(ScriptedEngine([3, END]), Answers(RewardError("no")), tokenizer, Scorer())
    assert message == Failed(group_id="g", cause="reward", error="no")


# ------------------------------------------------------------ on the small engine

SMALL = RolloutConfig(engine="small", context_tokens=200, max_tokens=120, max_sequences=16)


def play_small(
    model: Path, config: RolloutConfig, tokenizer: Any, asked: GenerateRequest, answers: Answers
) -> list[Episode]:
    async def scenario() -> list[Episode]:
        engine = make_engine(config, str(model), seed=7, version=2)
        await engine.start()
        try:
            return await episodes_of(engine, answers, tokenizer, PLAIN, config.context_tokens).play(asked, {})
        finally:
            await engine.close()

    return asyncio.run(scenario())


def test_logprobs_of_every_turn_are_those_of_the_whole_text(
    tiny_model: Path, tiny_weights: dict, reference: Callable, tokenizer: Any
) -> None:
    """As the learner will see it: one sequence, in which each turn was sampled given all that stands before it."""
    asked = request(size=8, max_tokens=120)
    played = play_small(tiny_model, SMALL, tokenizer, asked, Answers("12+3", "#", "<eos>9"))
    assert sum(len(episode.transcript) > 1 for episode in played) >= 3
    for episode in played:
        completion, sampled = episode.completion, episode.completion.sampled().astype(bool)
        expected = reference(tiny_weights, PROMPT, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs[sampled], expected[sampled], atol=1e-5)
        ends = np.flatnonzero(completion.token_ids == END)
        assert len(ends) == sum(m.role == "assistant" for m in episode.transcript) - completion.truncated
        assert sampled[ends].all()


def test_budgets_of_reasoning_are_each_turns(tiny_model: Path, tokenizer: Any) -> None:
    budgets = ReasoningConfig(thinking_tokens=6, solution_tokens=6, end="=;")
    config = RolloutConfig(engine="small", context_tokens=200, max_tokens=120, max_sequences=16, reasoning=budgets)
    played = play_small(tiny_model, config, tokenizer, request(size=8, max_tokens=120), Answers("1", "2"))
    assert any(len(episode.transcript) > 1 for episode in played)
    for episode in played:
        for message in episode.transcript:
            assert len(message.text) <= 14


def test_a_prompt_that_fills_the_context_is_the_engines_to_refuse(tiny_model: Path, tokenizer: Any) -> None:
    asked = replace(request(), prompt_ids=PROMPT * 50)
    with pytest.raises(EngineError, match="prompt of 200 tokens, context of 200"):
        play_small(tiny_model, SMALL, tokenizer, asked, Answers())
