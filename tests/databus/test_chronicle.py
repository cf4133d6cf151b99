"""What the broker writes down, and that nothing is said before it is durable."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct
from scripted import (
    RunningBroker,
    ScriptedLearner,
    ScriptedWorker,
    broker_config,
    connect,
    make_group,
    receive,
    receives_nothing,
    send_group,
)

import databus.group_commit
from databus.client import Arrived
from databus.codec import Frame, frame_sizes
from databus.groups import GROUP_COLUMNS, decode_group
from databus.journal import Journal, read_journal
from databus.messages import Ack, Batch, BatchGroup, BatchRequest, Credits, Lease
from databus.outbox import Outbox
from databus.records import BatchCut, BrokerEnded, BrokerStarted, GroupCompleted, GroupLeased, GroupMoved, StepTaken


def test_a_run_is_written_down_in_its_order(address: str, tmp_path: Path) -> None:
    running = RunningBroker(broker_config(address, steps=2), journal=Journal(tmp_path))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    batches = [learner.step(step) for step in range(2)]
    learner.finish()
    worker.join()
    running.join()
    entries = list(read_journal(tmp_path))
    records = [entry.record for entry in entries]
    ended = records[-1]
    assert isinstance(ended, BrokerEnded) and (ended.ok, ended.reason) == (True, "all steps are done")
    times = [record.time_s for record in records]
    assert times == sorted(times) and times[0] > 0
    cuts = [record for record in records if isinstance(record, BatchCut)]
    assert [cut.group_ids for cut in cuts] == [tuple(group.group_id for group in batch.groups) for batch in batches]
    assert [record.step for record in records if isinstance(record, StepTaken)] == [0, 1]
    for cut in cuts:
        for group_id in cut.group_ids:
            history = [type(each) for each in records if getattr(each, "group_id", "") == group_id]
            assert history == [GroupLeased, GroupCompleted]
    completed = next(entry for entry in entries if isinstance(entry.record, GroupCompleted))
    assert [column.name for column in completed.record.columns] == list(GROUP_COLUMNS)
    assert [frame.nbytes for frame in completed.frames] == frame_sizes(completed.record.columns)


def test_lost_lease_is_written_down(address: str, tmp_path: Path) -> None:
    RunningBroker(broker_config(address), journal=Journal(tmp_path))
    first = connect(address, "first", "worker", max_sequences=4)
    first.send(Credits(total=1))
    lease = receive(first, Lease)
    first.close("done")
    second = connect(address, "second", "worker", max_sequences=4)
    second.send(Credits(total=1))
    again = receive(second, Lease)
    started, *records = [entry.record for entry in read_journal(tmp_path)]
    assert isinstance(started, BrokerStarted) and started.run_id == "test"
    times = [record.time_s for record in records if isinstance(record, GroupLeased | GroupMoved)]
    assert 0 < times[0] <= times[1] <= times[2]
    assert [msgspec.structs.replace(record, time_s=0.0) for record in records] == [
        GroupLeased(group_id=lease.group_id, cursor=0, attempt=0, worker="first"),
        GroupMoved(group_id=lease.group_id, state="expired"),
        GroupLeased(group_id=again.group_id, cursor=0, attempt=1, worker="second"),
    ]
    second.close("done")


class Disk:
    """In place of `os.pwritev`."""

    def __init__(self) -> None:
        self.is_full = False
        self._write = os.pwritev

    def __call__(self, descriptor: int, parts: Sequence[Any], offset: int) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no room")
        return self._write(descriptor, parts, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(databus.group_commit, "TRY_AGAIN_S", 0.1)
    monkeypatch.setattr(os, "pwritev", disk)
    return disk


def test_full_disk_holds_back_what_promises_something(address: str, tmp_path: Path, disk: Disk) -> None:
    RunningBroker(broker_config(address), journal=Journal(tmp_path))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    disk.is_full = True
    send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    worker.send(Credits(total=2))
    assert receives_nothing(worker, Struct, 0.5)
    disk.is_full = False
    assert receive(worker, Ack).accepted
    receive(worker, Lease)
    written = [type(entry.record) for entry in read_journal(tmp_path)]
    assert written == [BrokerStarted, GroupLeased, GroupCompleted, GroupLeased]
    worker.close("done")


def test_frames_of_a_batch_travel_before_it_is_durable_and_count_after(
    address: str, tmp_path: Path, disk: Disk
) -> None:
    RunningBroker(broker_config(address), journal=Journal(tmp_path))
    worker, learner = connect(address, "w", "worker", max_sequences=4), ScriptedLearner(address)
    worker.send(Credits(total=2))
    for lease in [receive(worker, Lease) for _ in range(2)]:
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
        receive(worker, Ack)
    disk.is_full = True
    learner.client.send(BatchRequest(step=0))
    assert receives_nothing(learner.client, Struct, 0.5)
    assert learner.client._ahead[0]
    disk.is_full = False
    arrived = learner.client.recv(5.0)
    assert arrived is not None and isinstance(arrived.message, Batch)
    assert all(decode_group(head.columns, frames_of(arrived, head)).size == 2 for head in arrived.message.groups)
    worker.close("done")
    learner.client.close("done")


def test_a_batch_whose_frames_are_lost_is_asked_for_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "send_ahead", lambda *_: True)
    running = RunningBroker(broker_config(address))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.client.send(BatchRequest(step=0))
    arrived = learner.client.recv(5.0)
    assert arrived is not None and isinstance(arrived.message, Batch)
    assert arrived.message.frames_id == 0 and arrived.frames
    for client in (worker.client, learner.client):
        client.close("done")
    assert running.failure is None


def frames_of(arrived: Arrived, head: BatchGroup) -> Sequence[Frame]:
    return arrived.frames[head.first_frame : head.first_frame + len(frame_sizes(head.columns))]
