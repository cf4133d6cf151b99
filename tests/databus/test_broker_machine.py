"""Broker, workers and learner as a state machine that may crash anywhere, against a model of what was promised."""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted import NoSocket, Prompts, Sink, broker_config, make_group
from test_recovery import digest

import databus.broker
import databus.group_commit
from databus.broker import Broker
from databus.config import BusConfig, HistoryConfig
from databus.groups import encode_group
from databus.journal import Journal, read_journal, recover, segments
from databus.messages import (
    Ack,
    Batch,
    BatchRequest,
    Completed,
    Credits,
    Failed,
    Goodbye,
    Hello,
    Holding,
    Lease,
    Position,
    PositionRequest,
    Released,
    StepDone,
    VersionApplied,
    VersionPublished,
)

WORKERS = ("one", "two")
BATCH_GROUPS = 2
KEPT_CHECKPOINTS = 2


class SlowDisk:
    """In place of the journal's thread: it writes when a rule says so, or somebody waits for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.writing: Writing | None = None

    def submit(self, write: Callable[[], None]) -> "Writing":
        self.writing = Writing(write)
        return self.writing

    def finish(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def shutdown(self) -> None:
        self.finish()


class Writing:
    def __init__(self, write: Callable[[], None]) -> None:
        self._write: Callable[[], None] | None = write

    def done(self) -> bool:
        return self._write is None

    def result(self) -> None:
        if self._write is not None:
            self._write()
            self._write = None


class BrokerThatCrashes(RuleBasedStateMachine):
    """What was said to a peer must hold ever after; what was not said may be forgotten.

    acknowledged: groups. batches: group ids of each step, as the learner first got them. step: the learner's next.
    """

    @initialize(policy=st.sampled_from(["drop", "mask", "requeue"]), max_staleness=st.integers(0, 2))
    def begin(self, policy: Any, max_staleness: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(databus.broker, "BrokerSocket", NoSocket)
        self.patch.setattr(databus.broker, "TICK_S", 0.0)
        self.patch.setattr(os, "fdatasync", lambda file: None)  # nothing here loses what the system has
        self.patch.setattr(os, "fsync", lambda file: None)
        self.patch.setattr(databus.group_commit, "ThreadPoolExecutor", SlowDisk)
        self.folder = Path(tempfile.mkdtemp())
        self.config = broker_config(
            "",
            steps=1000,
            batch_groups=BATCH_GROUPS,
            stale_policy=policy,
            max_staleness=max_staleness,
            max_reward_failures=10**6,
            bus=BusConfig(heartbeat_s=1e5, peer_timeout_s=1e6, lease_s=1e6),
            history=HistoryConfig(tokens=10**6, window_versions=10**6, total_tokens=10**6),
        )
        self.held: dict[str, tuple[str, Lease]] = {}
        self.unacknowledged: dict[str, tuple[str, Completed, list[bytes]]] = {}
        self.acknowledged: set[str] = set()
        self.batches: dict[int, tuple[str, ...]] = {}
        self.positions: dict[int, Position] = {}
        self.checkpoints = [0]
        self.step, self.has_batch = 0, False
        self.credits: Counter[str] = Counter()
        self.lives: Counter[str] = Counter()
        self.sink = Sink()
        self._start_broker()

    def teardown(self) -> None:
        self.broker._commit.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------ the broker

    def _start_broker(self) -> None:
        segment = recover(self.folder)
        first_row = len(self.sink.rows)
        journal, past = Journal(self.folder, segment), list(read_journal(self.folder))
        self.broker = Broker(self.config, Prompts(), [], self.sink, journal=journal, past=past, first_row=first_row)
        self.socket: NoSocket = self.broker._socket  # type: ignore[assignment]
        self.disk: SlowDisk = self.broker._commit._thread  # type: ignore[assignment]
        self._learner_joins()
        for worker in WORKERS:
            self._worker_joins(worker)

    @rule(is_written=st.booleans())
    def turn(self, is_written: bool) -> None:
        """One turn, before or after the disk has done what it was asked to."""
        if is_written:
            self.disk.finish()
        self.broker._turn()
        self._hear()

    @rule()
    def settle(self) -> None:
        """Until all is said."""
        for _ in range(3):
            self.turn(is_written=True)

    @rule(is_written=st.booleans())
    def broker_dies(self, is_written: bool) -> None:
        """What it had in mind is lost, and what it had begun to write is there or not."""
        if is_written:
            self.disk.finish()
        assert self.broker._commit._journal is not None
        os.close(self.broker._commit._journal._file)
        self._start_broker()

    @rule()
    def leases_expire(self) -> None:
        """Late results are still welcome."""
        self.broker._leases.tick(time.monotonic() + 1e7)

    @rule()
    def state_is_the_journal_folded(self) -> None:
        self.settle()
        folded = Broker(self.config, Prompts(), [], Sink(), past=list(read_journal(self.folder)))
        assert digest(folded._state) == digest(self.broker._state)
        assert folded._state.trained == self.broker._state.trained
        assert past_completions(folded) == past_completions(self.broker)
        folded._commit.close()

    # ------------------------------------------------------------ workers

    def _worker_joins(self, worker: str) -> None:
        version = self.step
        hello = Hello(role="worker", name=worker, max_sequences=8, version=version, pid=self.lives[worker])
        self.socket.put(worker, hello)
        held = tuple(group_id for group_id, (holder, _) in self.held.items() if holder == worker)
        waiting = tuple(group_id for group_id, (holder, _, _) in self.unacknowledged.items() if holder == worker)
        self.credits[worker] = 2
        self.socket.put(worker, Holding(group_ids=held + waiting, credits=2, version=version))
        for group_id in waiting:
            self._send_result(group_id)

    @rule(worker=st.sampled_from(WORKERS))
    def more_credit(self, worker: str) -> None:
        self.credits[worker] += 1
        self.socket.put(worker, Credits(total=self.credits[worker]))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), reward=st.sampled_from([0.0, 1.0]), copies=st.integers(1, 2))
    def complete(self, data: st.DataObject, reward: float, copies: int) -> None:
        group_id, (worker, lease) = self._pick(data)
        versions = [[data.draw(st.integers(max(0, self.step - 2), self.step)) for _ in range(2)] for _ in range(2)]
        columns, frames = encode_group(make_group(lease.prompt_ids, versions, [reward, 1.0]))
        message = Completed(group_id=group_id, columns=columns, reward_names=("reward",))
        self.unacknowledged[group_id] = worker, message, [bytes(frame) for frame in frames]
        for _ in range(copies):
            self._send_result(group_id)

    @precondition(lambda self: self.unacknowledged)
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        self._send_result(data.draw(st.sampled_from(sorted(self.unacknowledged))))

    def _send_result(self, group_id: str) -> None:
        worker, message, frames = self.unacknowledged[group_id]
        self.socket.put(worker, message, frames)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["engine", "reward", "released"]))
    def give_up(self, data: st.DataObject, how: Any) -> None:
        group_id, (worker, _) = self._pick(data)
        released = how == "released"
        self.socket.put(
            worker, Released(group_ids=(group_id,)) if released else Failed(group_id=group_id, cause=how, error="x")
        )

    def _pick(self, data: st.DataObject) -> tuple[str, tuple[str, Lease]]:
        group_id = data.draw(st.sampled_from(sorted(self.held)))
        return group_id, self.held.pop(group_id)

    @rule(worker=st.sampled_from(WORKERS), is_known=st.booleans())
    def worker_dies(self, worker: str, is_known: bool) -> None:
        """And is there again at once, with nothing."""
        self.held = {key: value for key, value in self.held.items() if value[0] != worker}
        self.unacknowledged = {key: value for key, value in self.unacknowledged.items() if value[0] != worker}
        self.lives[worker] += 1
        if is_known:
            self.socket.put(worker, Goodbye())
        self._worker_joins(worker)

    # ------------------------------------------------------------ the learner

    def _learner_joins(self) -> None:
        self.socket.put("learner", Hello(role="learner", name="learner", version=self.step))
        self.socket.put("learner", VersionPublished(version=self.step, address="", num_bytes=0))
        if self.step:
            self._report(self.step - 1)  # it may not have been heard
        self.has_batch = False
        self.ask()

    @rule()
    def ask(self) -> None:
        if not self.has_batch:
            self.socket.put("learner", BatchRequest(step=self.step))

    @precondition(lambda self: self.has_batch)
    @rule()
    def train(self) -> None:
        self._report(self.step)
        self.step, self.has_batch = self.step + 1, False
        self.socket.put("learner", VersionPublished(version=self.step, address="", num_bytes=0))
        for worker in WORKERS:
            self.socket.put(worker, VersionApplied(version=self.step))
        self.ask()

    def _report(self, step: int) -> None:
        self.socket.put("learner", StepDone(step=step, metrics={"loss/policy": 1.0}))

    @rule()
    def checkpoint(self) -> None:
        oldest = min(self.checkpoints)
        self.socket.put("learner", PositionRequest(step=self.step, oldest_checkpoint=oldest))

    @rule(data=st.data())
    def learner_dies(self, data: st.DataObject) -> None:
        """It is back at its newest checkpoint, or where that was not finished, at the one before."""
        self.settle()
        self.step = data.draw(st.sampled_from(self.checkpoints))
        self.checkpoints = [step for step in self.checkpoints if step <= self.step]
        self.socket.put("learner", Goodbye())
        self.socket.put("learner", Hello(role="learner", name="learner", version=self.step))
        self.socket.put("learner", VersionPublished(version=self.step, address="", num_bytes=0))
        self.has_batch = False
        self.ask()
        self.settle()
        assert self.has_batch or self.step == self.broker._state.step, "its batch is not there any more"

    # ------------------------------------------------------------ what they are told

    def _hear(self) -> None:
        hear: dict[type, Callable[[str, Any], None]] = {
            Lease: self._hear_lease,
            Ack: self._hear_ack,
            Batch: self._hear_batch,
            Position: self._hear_position,
        }
        while self.socket.sent:
            peer, message = self.socket.sent.popleft()
            if type(message) in hear:
                hear[type(message)](peer, message)

    def _hear_lease(self, worker: str, lease: Lease) -> None:
        assert lease.group_id not in self.acknowledged
        self.held[lease.group_id] = worker, lease

    def _hear_ack(self, _: str, ack: Ack) -> None:
        """Failures are acknowledged as well."""
        if ack.accepted:
            assert ack.group_id not in self.acknowledged, "a group was accepted twice"
        if ack.accepted and ack.group_id in self.unacknowledged:
            self.acknowledged.add(ack.group_id)
        self.unacknowledged.pop(ack.group_id, None)

    def _hear_batch(self, _: str, batch: Batch) -> None:
        group_ids = tuple(group.group_id for group in batch.groups)
        assert self.batches.setdefault(batch.step, group_ids) == group_ids, "another batch than before"
        self.has_batch |= batch.step == self.step

    def _hear_position(self, _: str, position: Position) -> None:
        if position.step == self.step:
            self.checkpoints = sorted({*self.checkpoints, self.step})[-KEPT_CHECKPOINTS:]

    # ------------------------------------------------------------ what must hold

    @invariant()
    def nothing_is_trained_twice(self) -> None:
        trained = Counter(group_id for group_ids in self.batches.values() for group_id in group_ids)
        assert all(times == 1 for times in trained.values())
        assert all(len(group_ids) == BATCH_GROUPS for group_ids in self.batches.values())

    @invariant()
    def what_was_acknowledged_is_somewhere(self) -> None:
        ledger = self.broker._state.ledger
        for group_id in self.acknowledged:
            entry = ledger.get(group_id)
            assert entry is None or entry.state == "completed"
        counts = ledger.counts()
        assert counts["trained"] == self.broker._state.step * BATCH_GROUPS
        assert len(self.acknowledged) <= counts["trained"] + counts["stale"] + counts["filtered"] + ledger.completed

    @invariant()
    def rows_are_those_of_the_steps(self) -> None:
        assert [row["step"] for row in self.sink.rows] == list(range(len(self.sink.rows)))

    @invariant()
    def no_segment_is_missing(self) -> None:
        numbers = segments(self.folder)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


def past_completions(broker: Broker) -> dict[int, list[int]]:
    """Identities of what is sent along with leases, by problem."""
    assert broker._state.history is not None
    return {key: [each.identity for each in completions] for key, completions in broker._state.history.items()}


BrokerThatCrashes.TestCase.settings = settings(
    max_examples=500, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBrokerThatCrashes = BrokerThatCrashes.TestCase
