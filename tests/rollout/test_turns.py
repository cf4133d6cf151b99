"""An engine that takes turns: asleep it computes nothing, and nobody can tell from its completions."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from scenarios import run, same

from databus.messages import Sampling
from databus.turns import EngineTurn, LearnerTurn, who_has
from rollout.config import RolloutConfig
from rollout.engine.base import Completion, EngineDead, GenerateRequest
from rollout.engine.factory import make_engine
from rollout.engine.turns import TurnEngine

CONFIG = RolloutConfig(engine="small", context_tokens=400)


def request(tokens: int = 200) -> GenerateRequest:
    sampling = Sampling(max_tokens=tokens, temperature=1.0)
    return GenerateRequest(group_id="a", prompt_ids=(6, 13, 8, 14), group_size=8, sampling=sampling)


def make(model: Path, turns: Path, start_timeout_s: float = 20.0) -> TurnEngine:
    engine = make_engine(CONFIG, str(model), seed=1, version=0, turns=turns)
    return TurnEngine(engine, EngineTurn(turns, "worker-0"), start_timeout_s)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_requests_in_flight_sleep_and_go_on(tiny_model: Path, tmp_path: Path) -> None:
    async def undisturbed() -> list[Completion]:
        engine = make_engine(CONFIG, str(tiny_model), seed=1, version=0)
        await engine.start()
        try:
            return await engine.generate(request())
        finally:
            await engine.close()

    async def in_turns() -> list[Completion]:
        learner, engine = LearnerTurn(tmp_path, 0, 20.0), make(tiny_model, tmp_path)
        await engine.start()
        turns = asyncio.ensure_future(engine.take_turns())
        try:
            group = asyncio.ensure_future(engine.generate(request()))
            for count in (1, 2, 3):
                seen = engine.stats().generated_tokens
                await until(lambda seen=seen: engine.stats().generated_tokens > seen)
                await asyncio.to_thread(learner.take)
                generated = engine.stats().generated_tokens
                await asyncio.sleep(0.2)
                assert engine.stats().generated_tokens == generated, f"it computes in turn {count} of the learner"
                assert not group.done()
                learner.give()
            return await group
        finally:
            await ended(turns)
            await engine.close()
            learner.close()

    assert same(run(in_turns()), run(undisturbed()))
    assert who_has(tmp_path, "engines") == []


def test_a_version_is_served_in_the_next_turn(
    tiny_model: Path, tmp_path: Path, make_snapshot: Callable, other_weights: Callable
) -> None:
    async def scenario() -> None:
        learner, engine = LearnerTurn(tmp_path, 0, 20.0), make(tiny_model, tmp_path)
        await engine.start()
        turns = asyncio.ensure_future(engine.take_turns())
        try:
            await asyncio.to_thread(learner.take)
            snapshot = make_snapshot(other_weights(1), 1)
            draining = asyncio.ensure_future(engine.drain())
            update = asyncio.ensure_future(engine.update(snapshot))
            await asyncio.sleep(0.1)
            assert not update.done() and not draining.done() and engine.version == 0
            learner.give()
            await asyncio.gather(draining, update)
            assert engine.version == 1
            snapshot.close()
        finally:
            await ended(turns)
            await engine.close()
            learner.close()

    run(scenario())


def test_it_starts_in_a_turn_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        learner, engine = LearnerTurn(tmp_path, 0, 20.0), make(tiny_model, tmp_path)
        learner.take()
        starting = asyncio.ensure_future(engine.start())
        await asyncio.sleep(0.1)
        assert not starting.done() and who_has(tmp_path, "engines") == []
        learner.give()
        await starting
        assert who_has(tmp_path, "engines") == ["worker-0"]
        await engine.close()
        await asyncio.to_thread(learner.take)
        impatient = make(tiny_model, tmp_path, start_timeout_s=0.1)
        with pytest.raises(EngineDead, match=r"the learner did not give up the device within 0\.1 s"):
            await impatient.start()
        await impatient.close()
        learner.close()

    run(scenario())
