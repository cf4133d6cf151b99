"""A broker that reads its journal is the broker that wrote it, whatever had happened, at every record."""

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from scripted import NoSocket, Prompts, Sink, broker_config, make_group

import databus.broker
from databus.broker import Broker
from databus.config import BrokerConfig, BusConfig, StalePolicy
from databus.groups import encode_group
from databus.journal import Journal, JournalDamaged, read_journal
from databus.messages import (
    Batch,
    BatchRequest,
    Completed,
    Credits,
    Failed,
    Goodbye,
    Hello,
    Lease,
    PositionRequest,
    Released,
    StepDone,
    VersionAnnounced,
    VersionApplied,
    VersionPublished,
)
from databus.run_state import RunState

STEPS = 6


def digest(state: RunState) -> dict[str, Any]:
    """All that a broker must not forget."""
    ledger = state.ledger
    return {
        "open": sorted(map(repr, ledger._open.values())),
        "pending": list(ledger._pending),
        "next": (ledger.next_cursor, ledger._num_leases, ledger.running, ledger.completed),
        "counts": ledger.counts(),
        "queue": [waiting.entry.group_id for waiting in state.queue._waiting],
        "batch": None if state.batch is None else (state.batch.step, [w.entry.group_id for w in state.batch.groups]),
        "masks": None if state.batch is None else [w.group.loss_mask.tobytes() for w in state.batch.groups],
        "step": state.step,
        "leases": sorted((held.group_id, held.worker) for held in state.leases._held.values()),
        "late": sorted(group_id for group_id in state.leases._late if ledger.get(group_id) is not None),
    }


class Theatre:
    """A broker and peers that draw what they do."""

    def __init__(self, config: BrokerConfig, journal: Journal, draw: random.Random) -> None:
        self._draw = draw
        self.broker = Broker(config, Prompts(), [], Sink(), journal=journal)
        self.socket: NoSocket = self.broker._socket  # type: ignore[assignment]
        self._versions = {"w0": 0, "w1": 0}
        self._credits = dict.fromkeys(self._versions, 0)
        for worker in self._versions:
            self._join(worker)
        self.socket.put("learner", Hello(role="learner", name="learner"))
        self.socket.put("learner", VersionPublished(version=0, address="", num_bytes=0))
        self.socket.put("learner", BatchRequest(step=0))

    def _join(self, worker: str) -> None:
        self.socket.put(worker, Hello(role="worker", name=worker, max_sequences=8, version=self._versions[worker]))
        self._credits[worker] = 6
        self.socket.put(worker, Credits(total=6))

    def turn(self) -> None:
        self.broker._turn()
        while self.broker._commit.is_busy:
            self.broker._commit.turn()
        while self.socket.sent:
            self._answer(*self.socket.sent.popleft())

    def _answer(self, peer: str, message: Struct) -> None:
        match message:
            case Lease():
                self._answer_lease(peer, message)
            case VersionAnnounced(version=version):
                self._versions[peer] = version
                self.socket.put(peer, VersionApplied(version=version))
            case Batch(step=step):
                if step % 2 == 0 and step:
                    self.socket.put("learner", PositionRequest(step=step, oldest_checkpoint=step - 2))
                self.socket.put("learner", VersionPublished(version=step + 1, address="", num_bytes=0))
                self.socket.put("learner", StepDone(step=step, metrics={"loss/policy": 1.0}))
                if step + 1 < STEPS:
                    self.socket.put("learner", BatchRequest(step=step + 1))

    def _answer_lease(self, worker: str, lease: Lease) -> None:
        chance = self._draw.random()
        self._credits[worker] += 1
        if chance < 0.06:
            self.socket.put(worker, Failed(group_id=lease.group_id, cause="engine", error="x"))
        elif chance < 0.1:
            self.socket.put(worker, Failed(group_id=lease.group_id, cause="reward", error="x"))
        elif chance < 0.15:
            self.socket.put(worker, Released(group_ids=(lease.group_id,)))
        elif chance < 0.2:
            self.socket.put(worker, Goodbye())
            self._join(worker)
            if chance < 0.18:
                self._complete(worker, lease)  # late
        else:
            self._complete(worker, lease)
        self.socket.put(worker, Credits(total=self._credits[worker]))

    def _complete(self, worker: str, lease: Lease) -> None:
        newest = self._versions[worker]
        versions = [[self._draw.randint(max(0, newest - 2), newest) for _ in range(3)] for _ in range(lease.group_size)]
        reward = self._draw.choice([0.0, 1.0])
        mask = [self._draw.choice([0, 1, 1, 1]) for each in versions for _ in each]
        columns, frames = encode_group(make_group(lease.prompt_ids, versions, [reward] * 2, mask))
        message = Completed(group_id=lease.group_id, columns=columns, reward_names=("reward",))
        self.socket.put(worker, message, [bytes(frame) for frame in frames])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["drop", "mask", "requeue"]), st.integers(0, 2))
def test_state_is_the_journal_folded(seed: int, policy: StalePolicy, max_staleness: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(databus.broker, "BrokerSocket", NoSocket)
        patch.setattr(databus.broker, "TICK_S", 0.0)
        patch.setattr(os, "fdatasync", lambda file: None)  # thousands of them, which a busy disk takes minutes for
        folder = Path(name)
        patient = BusConfig(heartbeat_s=1e5, peer_timeout_s=1e6, lease_s=1e6)  # nobody is lost to a slow machine
        config = broker_config(
            "", steps=STEPS, stale_policy=policy, max_staleness=max_staleness, max_reward_failures=99, bus=patient
        )
        theatre = Theatre(config, Journal(folder), random.Random(seed))
        for _ in range(60):
            theatre.turn()
            recovered = Broker(config, Prompts(), [], Sink(), past=read_journal(folder))
            assert digest(recovered._state) == digest(theatre.broker._state)
        assert theatre.broker._state.step > 0
        theatre.broker._commit.close()


def test_records_that_do_not_follow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databus.broker, "BrokerSocket", NoSocket)
    monkeypatch.setattr(databus.broker, "TICK_S", 0.0)
    config = broker_config("", steps=STEPS)
    theatre = Theatre(config, Journal(tmp_path), random.Random(0))
    for _ in range(5):
        theatre.turn()
    theatre.broker._commit.close()
    without_a_lease = (entry for place, entry in enumerate(read_journal(tmp_path)) if place != 1)
    with pytest.raises(
        JournalDamaged, match=r"segment 0, byte .*: Group.* does not follow from what was written before"
    ):
        Broker(config, Prompts(), [], Sink(), past=without_a_lease)
