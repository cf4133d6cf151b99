"""History from the broker to the engine: real broker, real sockets, real workers, the small engine."""

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import RunningBroker, ScriptedLearner, broker_config

from databus.client import BusClient
from databus.config import HistoryConfig
from databus.history import PastCompletion, encode_history, problem_key
from databus.messages import Hello, Lease, Sampling
from databus.prompts import Prompt
from rewards.sample import Sample
from rollout.config import RolloutConfig
from rollout.engine.base import Completion, GenerateRequest
from rollout.engine.small_engine import SmallEngine
from rollout.history_in import HistoryReader
from rollout.lease_work import LeaseWork
from rollout.worker import Worker

PROMPTS = ((6, 13, 8, 14), (7, 13, 5, 14), (4, 13, 4, 14))
HISTORY = HistoryConfig(tokens=1000, window_versions=9, total_tokens=10_000)


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ipc address whose path is short enough."""
    return f"ipc://{tmp_path_factory.mktemp('bus')}/s"


class Prompts:
    def get(self, cursor: int) -> Prompt:
        return Prompt("", PROMPTS[cursor % len(PROMPTS)], b"{}")


class Scorer:
    async def score(self, samples: list[Sample]) -> list[dict[str, float]]:
        return [{"reward": float(index)} for index in range(len(samples))]


class WatchedEngine(SmallEngine):
    """Remembers what it was asked and what it answered."""

    def __init__(self, model: Path) -> None:
        super().__init__(RolloutConfig(engine="small", context_tokens=64), str(model), seed=0, version=0)
        self.requests: list[GenerateRequest] = []
        self.answers: dict[str, list[Completion]] = {}

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        self.requests.append(request)
        self.answers[request.group_id] = completions = await super().generate(request)
        return completions


async def work(engine: WatchedEngine, address: str, name: str, groups: int) -> None:
    """Until so many groups have been asked for and answered."""
    await engine.start()
    client = BusClient(address, Hello(role="worker", name=name, max_sequences=2))
    await asyncio.to_thread(client.connect, 5.0)
    worker = Worker(client, LeaseWork(engine, Scorer(), lambda ids: ""), group_size=2, max_sequences=2)
    running = asyncio.ensure_future(worker.run())
    async with asyncio.timeout(60):
        while len(engine.answers) < groups and not running.done():
            await asyncio.sleep(0.01)
    worker.stop("enough")
    await running
    await asyncio.to_thread(client.close, "done")
    await engine.close()


def tokens_of(past: Sequence[tuple[int, Any]]) -> set[tuple[int, ...]]:
    return {tuple(tokens.tolist()) for _, tokens in past}


def test_a_worker_that_has_just_joined_gets_what_an_old_one_would(address: str, tiny_model: Path) -> None:
    running = RunningBroker(broker_config(address, history=HISTORY, max_staleness=30, steps=30), prompts=Prompts())
    learner = ScriptedLearner(address)
    old, new = WatchedEngine(tiny_model), WatchedEngine(tiny_model)
    asyncio.run(work(old, address, "old", groups=7))
    asyncio.run(work(new, address, "new", groups=3))
    learner.client.close("done")
    running.stop()
    assert [request.problem for request in old.requests[:3]] == [problem_key(prompt) for prompt in PROMPTS]
    for request in new.requests[:3]:
        answered = [
            old.answers[each.group_id]
            for each in old.requests
            if each.prompt_ids == request.prompt_ids and each.group_id in old.answers
        ]
        everything = {tuple(one.token_ids.tolist()) for group in answered for one in group}
        assert len(answered) >= 2
        # The old worker's last group may have been given back when it left, not counted by the broker.
        newest_left_out = {tuple(one.token_ids.tolist()) for group in answered[:-1] for one in group}
        assert newest_left_out <= tokens_of(request.history) <= everything
        assert len(set(request.history_ids)) == len(request.history)
        assert all(version == 0 and tokens.dtype == np.int32 for version, tokens in request.history)


# ---------------------------------------------------------------- bad input


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "group_id": "g",
        "cursor": 0,
        "attempt": 0,
        "purpose": "train",
        "prompt": "",
        "prompt_ids": (1,),
        "problem": json.dumps({}).encode(),
        "group_size": 2,
        "sampling": Sampling(max_tokens=8),
        "lease_s": 30.0,
    }
    return Lease(**(fields | changes))


def test_a_malformed_history_costs_a_warning_and_no_lease(caplog: pytest.LogCaptureFixture) -> None:
    reader = HistoryReader()
    columns, frames = encode_history([PastCompletion(3, 9, np.array([1, 2], np.int32))])
    (past,) = reader.read(lease(history=columns), frames)
    assert (past.version, past.identity, past.token_ids.tolist()) == (3, 9, [1, 2])
    with caplog.at_level(logging.WARNING):
        for broken in (frames[:-1], [b"123", *frames[1:]], [*frames, b""]):
            assert reader.read(lease(history=columns), broken) == ()
    assert reader.malformed == 3
    assert [record.message for record in caplog.records] == [
        "group g is generated without its history: 1 frames announced, 0 frames received"
    ]
    assert reader.read(lease(), ()) == ()
    assert reader.malformed == 3
