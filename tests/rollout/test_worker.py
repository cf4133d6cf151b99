import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

import rollout.versions
import rollout.worker
from databus.client import Arrived
from databus.codec import Frame
from databus.errors import BusLost
from databus.groups import Group, decode_group
from databus.messages import (
    Ack,
    Cancel,
    Completed,
    Credits,
    Drain,
    Failed,
    Holding,
    Lease,
    Leaving,
    Manifest,
    Refused,
    Released,
    Sampling,
    Stop,
    VersionAnnounced,
    VersionApplied,
)
from rewards.errors import RewardError
from rewards.sample import Sample
from rollout.engine.base import (
    Completion,
    EngineDead,
    EngineError,
    EngineStats,
    GenerateRequest,
    Snapshot,
    UpdateFailed,
    UpdateReport,
)
from rollout.lease_work import LeaseWork
from rollout.weight_source import PullError, VersionGoneError
from rollout.worker import Worker, WorkerRefusedError


class FakeBus:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, Sequence[Frame]]] = []
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()

    def send(self, message: Struct, frames: Sequence[Frame] = ()) -> None:
        self.sent.append((message, frames))

    async def recv_async(self) -> Arrived:
        item = await self.inbox.get()
        if isinstance(item, Exception):
            raise item
        return Arrived(item, ())

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.inbox.put_nowait(message)

    def all(self, kind: type) -> list[Any]:
        return [message for message, _ in self.sent if isinstance(message, kind)]

    async def wait(self, kind: type, count: int = 1) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.all(kind)) < count:
                await asyncio.sleep(0.002)
        return self.all(kind)

    def credits(self) -> int:
        return max(message.total for message in self.all(Credits))

    def group(self, group_id: str) -> Group:
        for message, frames in self.sent:
            if isinstance(message, Completed) and message.group_id == group_id:
                return decode_group(message.columns, frames)
        raise AssertionError(f"{group_id} was not completed")


class FakeEngine:
    """Answers when `gate` is open; a group's name says what goes wrong with it."""

    def __init__(self) -> None:
        self.version = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.aborted: list[str] = []
        self.updates: list[int] = []
        self.update_error: Exception | None = None
        self.updating = asyncio.Event()
        self.finish_update = asyncio.Event()
        self.finish_update.set()
        self.logprobs_of: dict[str, tuple[float, float]] = {
            "not a number": (-1, np.nan),
            "certainly not": (-np.inf, -1),
        }

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    async def generate(self, request: GenerateRequest) -> list[Completion]:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted.append(request.group_id)
            raise
        if request.group_id.startswith("broken"):
            raise EngineError("the engine refused it")
        if request.group_id == "deadly":
            raise EngineDead("the engine has died")
        tokens = np.array([65, 66, 2], np.int32)
        versions = np.full(3, self.version, np.int32)
        logprobs = np.array([-1, *self.logprobs_of.get(request.group_id, (-1, -1))], np.float32)
        one = Completion(token_ids=tokens, logprobs=logprobs, versions=versions, truncated=False)
        return [one] * request.group_size

    async def drain(self) -> None: ...

    async def update(self, snapshot: Snapshot) -> UpdateReport:
        self.updating.set()
        self.updates.append(snapshot.version)
        await self.finish_update.wait()
        if self.update_error is not None:
            raise self.update_error
        self.version = snapshot.version
        return UpdateReport(pause_s=0.25)


class FakeScorer:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def score(self, samples: list[Sample]) -> list[dict[str, float]]:
        await self.gate.wait()
        self.samples += samples
        if samples[0].prompt == "unscorable":
            raise RewardError("reward 'mine.py:f' failed: KeyError: 'x'")
        return [{"reward": float(index)} for index in range(len(samples))]


class Setting:
    """A worker with everything around it faked."""

    def __init__(self, **settings: Any) -> None:
        self.bus = FakeBus()
        self.engine = FakeEngine()
        self.scorer = FakeScorer()
        self.pulled: list[int] = []
        self.pull_errors: list[Exception] = []
        options: dict[str, Any] = {"group_size": 4, "max_sequences": 13, "pull": self.pull} | settings
        self.worker = Worker(self.bus, LeaseWork(self.engine, self.scorer, self.detokenize), **options)
        self.running = asyncio.ensure_future(self.worker.run())

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(chr(index) for index in ids if index != 2)

    def pull(self, address: str, version: int, num_bytes: int, stop: threading.Event) -> Snapshot:
        self.pulled.append(version)
        if self.pull_errors:
            raise self.pull_errors.pop(0)
        manifest = Manifest(version=version, num_bytes=num_bytes, chunk_bytes=1, tensors=())
        return FakeSnapshot(version=version, manifest=manifest, fd=-1)

    async def end(self) -> Stop:
        self.bus.say(Stop(reason="done"))
        return await asyncio.wait_for(self.running, 10)


class FakeSnapshot(Snapshot):
    def close(self) -> None: ...


def lease(group_id: str, **changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "group_id": group_id,
        "cursor": 0,
        "attempt": 0,
        "purpose": "train",
        "prompt": "1+2=",
        "prompt_ids": (4, 5, 6),
        "problem": json.dumps({"answer": "3"}).encode(),
        "group_size": 4,
        "sampling": Sampling(max_tokens=8),
        "lease_s": 30.0,
    }
    return Lease(**(fields | changes))


def announce(version: int) -> VersionAnnounced:
    return VersionAnnounced(version=version, address="ipc://nowhere", num_bytes=77)


def run(scenario: Callable[[Setting], Any], **settings: Any) -> Any:
    async def inside() -> Any:
        return await asyncio.wait_for(scenario(Setting(**settings)), 30)

    return asyncio.run(inside())


def test_life_of_a_lease() -> None:
    async def scenario(setting: Setting) -> None:
        bus = setting.bus
        assert (await bus.wait(Credits))[0].total == 3
        bus.say(lease("a"))
        (completed,) = await bus.wait(Completed)
        assert completed.reward_names == ("reward",)
        group = bus.group("a")
        assert group.prompt_ids.tolist() == [4, 5, 6]
        assert group.rewards.tolist() == [0.0, 1.0, 2.0, 3.0]
        assert bus.credits() == 4
        assert setting.scorer.samples[0] == Sample(
            prompt="1+2=", completion="AB", problem={"answer": "3"}, num_tokens=3, truncated=False
        )
        assert (await setting.end()).reason == "done"

    run(scenario)


def test_room_is_given_back_before_scoring() -> None:
    async def scenario(setting: Setting) -> None:
        setting.scorer.gate.clear()
        setting.bus.say(lease("a"))
        await setting.bus.wait(Credits, 2)
        assert setting.bus.credits() == 4
        assert not setting.bus.all(Completed)
        setting.scorer.gate.set()
        await setting.bus.wait(Completed)
        await setting.end()
        assert setting.bus.credits() == 4

    run(scenario)


def test_results_are_sent_until_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.worker, "RESEND_S", 0.05)

    async def scenario(setting: Setting) -> None:
        bus = setting.bus
        bus.say(lease("a"), lease("broken"))
        await bus.wait(Completed, 3)
        await bus.wait(Failed, 3)
        bus.say(lease("a"))  # a copy: it is not generated again
        bus.say(Ack(group_id="a", accepted=True), Ack(group_id="broken", accepted=False, reason="late"))
        await asyncio.sleep(0.1)
        sent = len(bus.all(Completed)) + len(bus.all(Failed))
        await asyncio.sleep(0.2)
        assert len(bus.all(Completed)) + len(bus.all(Failed)) == sent
        assert len(setting.scorer.samples) == 4
        await setting.end()

    run(scenario)


def test_says_again_and_again_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases, credits and version: any message about them may have been lost."""
    monkeypatch.setattr(rollout.worker, "RESEND_S", 0.05)

    async def scenario(setting: Setting) -> None:
        bus = setting.bus
        setting.engine.gate.clear()
        bus.say(lease("a"), VersionAnnounced(version=3, address="", num_bytes=0))
        await bus.wait(VersionApplied)
        said = len(bus.all(Holding))
        await bus.wait(Holding, said + 2)
        assert bus.all(Holding)[-1] == Holding(group_ids=("a",), credits=setting.bus.credits(), version=3)
        setting.engine.gate.set()
        await bus.wait(Completed)
        said = len(bus.all(Holding))
        await bus.wait(Holding, said + 2)
        assert bus.all(Holding)[-1].group_ids == ("a",), "not acknowledged yet"
        bus.say(Ack(group_id="a", accepted=True))
        said = len(bus.all(Holding))
        await bus.wait(Holding, said + 2)
        assert bus.all(Holding)[-1].group_ids == ()
        await setting.end()

    run(scenario)


def test_failures_name_their_stage() -> None:
    async def scenario(setting: Setting) -> None:
        setting.bus.say(lease("broken"), lease("b", prompt="unscorable"), lease("c"))
        failed = {message.group_id: message for message in await setting.bus.wait(Failed, 2)}
        assert (failed["broken"].cause, failed["broken"].error) == ("engine", "the engine refused it")
        assert failed["b"].cause == "reward"
        assert "mine.py:f" in failed["b"].error
        await setting.bus.wait(Completed)
        assert setting.bus.credits() == 6, "every way to end gives its room back"
        await setting.end()

    run(scenario)


def test_cancel_aborts_and_frees() -> None:
    async def scenario(setting: Setting) -> None:
        setting.engine.gate.clear()
        setting.bus.say(lease("a"), lease("b"))
        await asyncio.sleep(0.02)
        setting.bus.say(Cancel(group_ids=("a", "unknown")), lease("unborn"), Cancel(group_ids=("unborn",)))
        await setting.bus.wait(Credits, 3)
        assert setting.engine.aborted == ["a"]
        assert setting.bus.credits() == 5
        setting.engine.gate.set()
        (completed,) = await setting.bus.wait(Completed)
        assert completed.group_id == "b"
        await setting.end()

    run(scenario)


def test_a_lease_past_its_time_is_released() -> None:
    async def scenario(setting: Setting) -> None:
        setting.engine.gate.clear()
        setting.bus.say(lease("slow", lease_s=0.05))
        (released,) = await setting.bus.wait(Released)
        assert released.group_ids == ("slow",)
        assert setting.engine.aborted == ["slow"]
        assert setting.bus.credits() == 4
        await setting.end()

    run(scenario)


def test_evaluation_costs_no_credit() -> None:
    async def scenario(setting: Setting) -> None:
        leases = [lease(f"eval-0-{index}", purpose="eval", group_size=1) for index in range(5)]
        setting.bus.say(*leases)
        await setting.bus.wait(Completed, 5)
        assert setting.bus.group("eval-0-3").size == 1
        assert setting.bus.credits() == 3
        await setting.end()

    run(scenario)


def test_newest_version_is_pulled_and_applied() -> None:
    async def scenario(setting: Setting) -> None:
        bus, engine = setting.bus, setting.engine
        bus.say(announce(1), announce(3), announce(2))
        (applied,) = await bus.wait(VersionApplied)
        assert setting.pulled == [3], "what was overtaken is not pulled"
        assert (applied.version, applied.pause_s, applied.received_bytes) == (3, 0.25, 77)
        assert engine.version == 3
        bus.say(announce(3), announce(4))
        await bus.wait(VersionApplied, 2)
        assert engine.updates == [3, 4]
        await setting.end()

    run(scenario)


def test_groups_of_a_version_follow_its_notice() -> None:
    """The broker refuses tokens of a version that the worker has not said it serves."""

    async def scenario(setting: Setting) -> None:
        bus, engine = setting.bus, setting.engine
        engine.finish_update.clear()
        bus.say(announce(1))
        await engine.updating.wait()
        engine.version = 1  # the engine serves it, but `update` has not returned
        bus.say(lease("a"))
        await bus.wait(Credits, 2)
        await asyncio.sleep(0.05)
        assert not bus.all(Completed)
        engine.finish_update.set()
        await bus.wait(Completed)
        kinds = [type(message) for message, _ in bus.sent]
        assert kinds.index(VersionApplied) < kinds.index(Completed)
        await setting.end()

    run(scenario)


def test_a_pull_that_fails_is_tried_again() -> None:
    async def scenario(setting: Setting) -> None:
        setting.pull_errors = [PullError("flipped"), PullError("flipped")]
        setting.bus.say(announce(1))
        await setting.bus.wait(VersionApplied)
        assert setting.pulled == [1, 1, 1]
        setting.pull_errors = [PullError(f"flipped {index}") for index in range(3)]
        setting.bus.say(announce(2))
        with pytest.raises(PullError, match="flipped 2"):
            await setting.running

    run(scenario)


def test_a_version_that_is_gone_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(setting: Setting) -> None:
        setting.pull_errors = [VersionGoneError("gone")]
        setting.bus.say(announce(1))
        await asyncio.sleep(0.05)
        assert setting.pulled == [1]
        setting.bus.say(announce(5))
        (applied,) = await setting.bus.wait(VersionApplied)
        assert applied.version == 5
        monkeypatch.setattr(rollout.versions, "GONE_TIMEOUT_S", 0.05)
        setting.pull_errors = [VersionGoneError("gone")]
        setting.bus.say(announce(6))
        with pytest.raises(PullError, match="version 6 is gone, and no newer one came"):
            await setting.running

    run(scenario)


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda setting: setting.bus.say(BusLost("nothing heard")), BusLost),
        (lambda setting: setting.bus.say(Refused(reason="given up for dead")), WorkerRefusedError),
        (lambda setting: setting.bus.say(lease("deadly")), EngineDead),
    ],
)
def test_what_breaks_ends_the_worker(break_it: Callable[[Setting], None], error: type[Exception]) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.bus.wait(Credits)
        break_it(setting)
        with pytest.raises(error):
            await asyncio.wait_for(setting.running, 5)

    run(scenario)


@pytest.mark.parametrize(("group_id", "said"), [("not a number", "nan (token 2"), ("certainly not", "-inf (token 1")])
def test_an_engine_that_gives_no_numbers_ends_the_worker(group_id: str, said: str) -> None:
    """It would give the next group the same; leasing that again would go on for ever."""

    async def scenario(setting: Setting) -> None:
        setting.bus.say(lease(group_id))
        with pytest.raises(EngineDead) as caught:
            await asyncio.wait_for(setting.running, 5)
        assert str(caught.value) == (
            f"the engine gave the log-probability {said} of a completion of group {group_id}, version 0): "
            "its weights or its kernels are broken"
        )
        assert not setting.bus.all(Completed)
        assert not setting.scorer.samples, "what is not sampled from the policy is not scored either"

    run(scenario)


def test_updates_that_fail_end_the_worker() -> None:
    async def scenario(setting: Setting) -> None:
        setting.engine.update_error = UpdateFailed("version 1 refused: tensor 'x' is missing")
        setting.bus.say(announce(1))
        with pytest.raises(UpdateFailed, match="'x' is missing"):
            await asyncio.wait_for(setting.running, 5)
        assert setting.engine.updates == [1, 1, 1]
        assert not setting.bus.all(VersionApplied)

    run(scenario)


def test_told_to_stop_it_gives_its_leases_back() -> None:
    async def scenario(setting: Setting) -> None:
        setting.engine.gate.clear()
        setting.bus.say(lease("a"), lease("b"))
        await asyncio.sleep(0.02)
        setting.worker.stop("told to stop")
        stop = await asyncio.wait_for(setting.running, 5)
        assert (stop.reason, stop.ok) == ("told to stop", True)
        (released,) = setting.bus.all(Released)
        assert set(released.group_ids) == {"a", "b"}
        assert sorted(setting.engine.aborted) == ["a", "b"]

    run(scenario)


def test_leaving_worker_finishes_what_is_nearly_done_and_hands_back_the_rest() -> None:
    async def scenario(setting: Setting) -> None:
        bus = setting.bus
        setting.worker._durations._done.append(1000.0)  # so a group that has just begun has long to go
        setting.engine.gate.clear()
        bus.say(lease("old"), lease("new"))
        await until(lambda: len(setting.worker._running) == 2)
        setting.worker._durations._started["old"] -= 999.0
        credits = bus.credits()
        setting.worker.leave("told to leave")
        assert (await bus.wait(Released))[0].group_ids == ("new",)
        bus.say(lease("late"))
        assert (await bus.wait(Released, 2))[1].group_ids == ("late",)
        setting.engine.gate.set()
        assert (await bus.wait(Completed))[0].group_id == "old"
        await asyncio.sleep(0.2)
        assert not setting.running.done(), "its result is not acknowledged yet"
        bus.say(Ack(group_id="old", accepted=True))
        assert (await asyncio.wait_for(setting.running, 5)).reason == "told to leave"
        kinds = [type(message) for message, _ in bus.sent]
        assert kinds.index(Leaving) < kinds.index(Released)
        assert bus.credits() == credits, "it asks for nothing more"

    run(scenario)


def test_what_does_not_get_done_in_time_is_handed_back() -> None:
    async def scenario(setting: Setting) -> None:
        await leave_with_a_group(setting)
        assert (await setting.bus.wait(Released))[0].group_ids == ("a",)
        assert (await asyncio.wait_for(setting.running, 5)).ok

    run(scenario, drain_s=0.3)


def test_told_to_leave_twice_is_at_once() -> None:
    async def scenario(setting: Setting) -> None:
        await leave_with_a_group(setting)
        await setting.bus.wait(Leaving)
        setting.worker.leave("told again")
        assert (await asyncio.wait_for(setting.running, 5)).reason == "told again"
        assert setting.bus.all(Released)[0].group_ids == ("a",)

    run(scenario, drain_s=1000.0)


def test_broker_may_send_a_worker_away() -> None:
    async def scenario(setting: Setting) -> None:
        setting.bus.say(Drain(reason="slow"))
        assert (await setting.bus.wait(Leaving))[0].reason == "slow"
        assert (await asyncio.wait_for(setting.running, 5)).reason == "slow"

    run(scenario)


def test_end_of_the_run_cuts_leaving_short() -> None:
    async def scenario(setting: Setting) -> None:
        await leave_with_a_group(setting)
        await setting.bus.wait(Leaving)
        assert (await setting.end()).reason == "done"

    run(scenario, drain_s=1000.0)


async def leave_with_a_group(setting: Setting) -> None:
    """It is told to leave while its engine is at `a`, and will not get done."""
    setting.engine.gate.clear()
    setting.bus.say(lease("a"))
    await until(lambda: bool(setting.worker._running))
    setting.worker.leave("told to leave")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
