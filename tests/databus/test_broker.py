"""The broker over real sockets, with scripted workers and learner."""

import time
from pathlib import Path

import pytest
from scripted import (
    NoSocket,
    Prompts,
    RunningBroker,
    ScriptedLearner,
    ScriptedWorker,
    Sink,
    broker_config,
    connect,
    make_group,
    receive,
    send_group,
)

import databus.broker
from databus.broker import Broker
from databus.client import BusClient
from databus.codec import decode_columns, encode_columns
from databus.config import BusConfig
from databus.errors import BusRefused
from databus.groups import encode_group
from databus.journal import Journal, read_journal
from databus.messages import (
    Ack,
    Batch,
    BatchRequest,
    Cancel,
    Completed,
    Credits,
    Failed,
    Hello,
    Lease,
    Position,
    PositionRequest,
    Refused,
    Status,
    StatusRequest,
    StepDone,
    Stop,
)
from databus.prompts import Prompt
from databus.run_state import RunFailed


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_whole_run(address: str, max_staleness: int) -> None:
    running = RunningBroker(broker_config(address, max_staleness=max_staleness, steps=4))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    for step in range(4):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join()
    assert running.failure is None
    rows = running.sink.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert max(row["staleness/max_versions"] for row in rows) <= max_staleness
    assert rows[-1]["ledger/trained_groups"] == 8
    trained = [group.group_id for batch in learner.batches for group in batch.groups]
    assert len(set(trained)) == 8
    # Never more than the bound allows: a group's lease index fixes the step that trains it.
    for index, (version, _) in enumerate(worker.leases):
        assert index // 2 <= version + max_staleness


def test_evaluation_is_of_one_version_and_never_trained(address: str) -> None:
    evals = [Prompt(f"e{i}", (9, i + 1), b"{}") for i in range(7)]
    running = RunningBroker(broker_config(address, eval_every=2, steps=3), evals)
    worker, learner = ScriptedWorker(address, max_sequences=3), ScriptedLearner(address)
    for step in range(3):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join()
    rows = {row["step"]: row for row in running.sink.rows}
    assert {step for step, row in rows.items() if "eval/accuracy" in row} == {0, 2, 3}
    assert all(row["eval/accuracy"] == 1.0 for row in rows.values() if "eval/accuracy" in row)
    assert "loss/policy" not in rows[3]
    sampled = [(version, lease) for version, lease in worker.leases if lease.purpose == "eval"]
    assert sorted(version for version, _ in sampled) == [0] * 7 + [2] * 7 + [3] * 7
    assert all(lease.sampling.temperature == 0 and lease.group_size == 1 for _, lease in sampled)
    trained = {group.group_id for batch in learner.batches for group in batch.groups}
    assert not trained & {lease.group_id for _, lease in sampled}


def test_duplicate_is_acknowledged_and_ignored(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=2))
    leases = [receive(worker, Lease) for _ in range(2)]
    for lease in leases:
        group = make_group(lease.prompt_ids, [[0, 0], [0]])
        send_group(worker, lease.group_id, group)
        assert receive(worker, Ack) == Ack(group_id=lease.group_id, accepted=True)
        send_group(worker, lease.group_id, group)
        assert not receive(worker, Ack).accepted
    learner = ScriptedLearner(address)
    assert {group.group_id for group in learner.step(0).groups} == {lease.group_id for lease in leases}
    learner.finish()
    worker.close("done")
    running.join()
    assert running.sink.rows[0]["ledger/trained_groups"] == 2


@pytest.mark.parametrize(
    ("versions", "prompt", "says"),
    [
        ([[0]], None, "1 completions"),
        ([[0], [0]], (5, 5), "another prompt"),
        ([[0] * 9, [0]], None, "9 tokens"),
        ([[0], [3]], None, "version 3"),
    ],
)
def test_wrong_groups_are_refused(address: str, versions: list, prompt: tuple | None, says: str) -> None:
    running = RunningBroker(broker_config(address))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    send_group(worker, lease.group_id, make_group(prompt or lease.prompt_ids, versions))
    assert says in receive(worker, Refused).reason
    send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))  # the lease still stands
    assert receive(worker, Ack).accepted
    worker.close("done")
    assert running.broker.refused == 1


def test_roles_are_held_to_their_messages(address: str) -> None:
    RunningBroker(broker_config(address))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(StepDone(step=0, metrics={}))
    assert "may not send StepDone" in receive(worker, Refused).reason
    observer = connect(address, "o", "observer")
    observer.send(Credits(total=9))
    assert "may not send Credits" in receive(observer, Refused).reason
    observer.send(StatusRequest())
    status = receive(observer, Status)
    assert status.phase == "starting" and [each.name for each in status.workers] == ["w"]
    for client in (worker, observer):
        client.close("done")


def test_status_says_how_long_ago_a_peer_said_hello(address: str) -> None:
    """Not when it was heard: of one that was killed, messages may be read after another was started in its place."""
    RunningBroker(broker_config(address, bus=BusConfig(heartbeat_s=0.05)))
    worker, learner = connect(address, "w", "worker", max_sequences=4), connect(address, "learner", "learner")
    observer = connect(address, "o", "observer")
    time.sleep(0.5)
    observer.send(StatusRequest())
    status = receive(observer, Status)
    assert status.workers[0].joined_s >= 0.5 and status.learner_joined_s >= 0.5
    assert status.workers[0].silent_s < 0.4 and status.learner_silent_s < 0.4
    for client in (worker, learner, observer):
        client.close("done")


def test_names_and_second_learner_are_refused(address: str) -> None:
    RunningBroker(broker_config(address))
    first = connect(address, "learner", "learner", pid=1, host="elsewhere")
    for name, words in (("learner", "is taken"), ("learner-2", "has a learner already")):
        second = BusClient(address, Hello(role="learner", name=name, pid=2, host="elsewhere"))
        with pytest.raises(BusRefused, match=words):
            second.connect(5.0)
    with pytest.raises(BusRefused, match="belongs to run other"):
        BusClient(address, Hello(role="worker", name="w", run_id="other")).connect(5.0)
    first.close("done")


def test_dead_worker_loses_its_leases(address: str) -> None:
    bus = BusConfig(heartbeat_s=0.1, peer_timeout_s=0.6, lease_s=60)
    running = RunningBroker(broker_config(address, steps=1, bus=bus))
    first = connect(address, "first", "worker", max_sequences=4)
    first.send(Credits(total=2))
    leases = [receive(first, Lease) for _ in range(2)]
    first.close()  # without goodbye, as if killed
    second = ScriptedWorker(address, "second")
    learner = ScriptedLearner(address)
    batch = learner.step(0)
    learner.finish()
    second.join()
    running.join()
    again = [lease for _, lease in second.leases]
    assert sorted((lease.cursor, lease.attempt) for lease in again) == [(0, 1), (1, 1)]
    assert not {lease.group_id for lease in leases} & {group.group_id for group in batch.groups}


def test_late_result_is_taken_and_the_other_attempt_cancelled(address: str) -> None:
    bus = BusConfig(heartbeat_s=0.1, peer_timeout_s=5, lease_s=0.5)
    RunningBroker(broker_config(address, bus=bus, batch_groups=1, max_staleness=0))
    slow = connect(address, "slow", "worker", max_sequences=4)
    slow.send(Credits(total=1))
    lease = receive(slow, Lease)
    assert receive(slow, Cancel).group_ids == (lease.group_id,)
    other = connect(address, "other", "worker", max_sequences=4)
    other.send(Credits(total=1))
    again = receive(other, Lease)
    assert (again.cursor, again.attempt) == (lease.cursor, 1)
    send_group(slow, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    assert receive(slow, Ack).accepted
    assert receive(other, Cancel).group_ids == (again.group_id,)
    send_group(other, again.group_id, make_group(again.prompt_ids, [[0], [0]]))
    assert not receive(other, Ack).accepted
    for client in (slow, other):
        client.close("done")


def test_reward_that_fails_in_a_row_ends_the_run(address: str) -> None:
    running = RunningBroker(broker_config(address))
    worker = connect(address, "w", "worker", max_sequences=8)
    worker.send(Credits(total=8))
    leases = [receive(worker, Lease) for _ in range(4)]
    for lease in leases[:3]:
        worker.send(Failed(group_id=lease.group_id, cause="reward", error="rewards.py:f raised KeyError: 'answer'"))
    stop = receive(worker, Stop)
    assert not stop.ok
    worker.send(Failed(group_id=leases[3].group_id, cause="reward", error="later"))  # the first cause stands
    worker.close("done")
    running.join()
    assert isinstance(running.failure, RunFailed)
    assert "for 3 groups in a row" in str(running.failure) and "KeyError: 'answer'" in str(running.failure)


def test_engine_failures_are_tried_again_then_counted(address: str) -> None:
    running = RunningBroker(broker_config(address, batch_groups=1, max_staleness=0, steps=1))
    worker = connect(address, "w", "worker", max_sequences=8)
    leases: list[Lease] = []
    for total in range(1, 5):
        worker.send(Credits(total=total))
        leases.append(receive(worker, Lease))
        if total < 4:
            worker.send(Failed(group_id=leases[-1].group_id, cause="engine", error="out of memory"))
    assert [(lease.cursor, lease.attempt) for lease in leases] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    send_group(worker, leases[-1].group_id, make_group(leases[-1].prompt_ids, [[0], [0]]))
    learner = ScriptedLearner(address)
    learner.step(0)
    learner.finish()
    worker.close("done")
    running.join()
    assert running.sink.rows[0]["ledger/failed_groups"] == 1


def test_position_survives_a_restart(address: str) -> None:
    config = broker_config(address, steps=4)
    RunningBroker(config)
    worker, learner = ScriptedWorker(address, credit=3), ScriptedLearner(address)
    learner.step(0)
    learner.client.send(PositionRequest(step=1))
    position = receive(learner.client, Position)
    trained = {group.group_id for group in learner.batches[0].groups}
    cursors = {lease.cursor for _, lease in worker.leases if lease.group_id in trained}
    assert cursors | {cursor for cursor, _ in position.pending} >= set(range(position.next_cursor))
    assert not cursors & {cursor for cursor, _ in position.pending}
    assert position.counts["trained"] == 2
    for peer in (worker, learner):
        peer.client.close("killed")

    other = f"{address}-again"
    again = RunningBroker(broker_config(other, steps=4, start_step=1), position=position)
    second, learner = ScriptedWorker(other), ScriptedLearner(other, start_step=1)
    for step in range(1, 4):
        learner.step(step)
    learner.finish()
    second.join()
    again.join()
    leased = [lease.cursor for _, lease in second.leases]
    pending = [cursor for cursor, _ in position.pending]
    assert leased[: len(pending)] == pending
    assert sorted(leased + list(cursors)) == list(range(8))  # nothing twice, nothing left out
    assert again.sink.rows[-1]["ledger/trained_groups"] == 8


def test_position_says_how_good_versions_are(address: str) -> None:
    """The learner keeps checkpoints by that; a broker that came back has it from the rows."""
    evals = [Prompt(f"e{i}", (9, i + 1), b"{}") for i in range(3)]
    running = RunningBroker(broker_config(address, eval_every=2, steps=3), evals, accuracies={-2: 0.5})
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    deadline = time.monotonic() + 20.0
    known: dict[int, float | None] = {}
    for step in range(3):
        learner.step(step)
    while 3 not in known or None in known.values():
        assert time.monotonic() < deadline
        learner.client.send(PositionRequest(step=3))
        known = receive(learner.client, Position).accuracies
    assert known == {-2: 0.5, 0: 1.0, 2: 1.0, 3: 1.0}
    learner.finish()
    worker.join()
    running.join()


def test_position_of_a_past_step_is_what_it_was(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that was killed before its checkpoint was complete takes the steps again, and asks again."""
    config = broker_config(address, steps=9)
    running = RunningBroker(config, journal=Journal(tmp_path))
    worker, learner = ScriptedWorker(address, credit=40), ScriptedLearner(address)

    def ask() -> Position:
        learner.client.send(PositionRequest(step=1))
        return receive(learner.client, Position)

    learner.step(0)
    first = ask()
    learner.step(1)
    assert ask() == first
    learner.step(2)
    assert ask() == first
    for peer in (worker, learner):
        peer.client.close("done")
    running.stop()
    monkeypatch.setattr(databus.broker, "BrokerSocket", NoSocket)
    recovered = Broker(config, Prompts(), [], Sink(), past=read_journal(tmp_path))
    assert recovered._retention.position(1) == first
    assert recovered._state.step == 3


def test_batch_request_is_idempotent(address: str) -> None:
    RunningBroker(broker_config(address))
    ScriptedWorker(address)
    learner = ScriptedLearner(address)
    batches = []
    for _ in range(2):
        learner.client.send(BatchRequest(step=0))
        batches.append(receive(learner.client, Batch))
    assert batches[0] == batches[1]
    learner.client.send(BatchRequest(step=5))
    assert "the run is at 0" in receive(learner.client, Refused).reason
    learner.client.close("done")


def test_learner_that_comes_back_is_served_the_same_batches(address: str, tmp_path: Path) -> None:
    running = RunningBroker(broker_config(address, steps=4), journal=Journal(tmp_path))
    worker, first = ScriptedWorker(address), ScriptedLearner(address)
    batches = [first.step(0), first.step(1)]
    first.client.close()  # without a word
    second = ScriptedLearner(address)
    assert [second.step(0), second.step(1)] == batches
    second.step(2)
    second.step(3)
    second.finish()
    worker.join()
    running.join()
    assert running.failure is None
    assert [row["step"] for row in running.sink.rows] == [0, 1, 2, 3]
    assert running.sink.rows[-1]["ledger/trained_groups"] == 8


def test_unknown_columns_are_refused_without_harm(address: str) -> None:
    running = RunningBroker(broker_config(address))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    group = make_group(lease.prompt_ids, [[0], [0]])
    arrays = decode_columns(*encode_group(group))
    columns, frames = encode_columns({name: array for name, array in arrays.items() if name != "truncated"})
    worker.send(Completed(group_id=lease.group_id, columns=columns, reward_names=("reward",)), frames)
    assert "truncated" in receive(worker, Refused).reason
    columns, frames = encode_group(group)
    worker.send(Completed(group_id=lease.group_id, columns=columns, reward_names=("reward",)), frames[:-1])
    assert "frames received" in receive(worker, Refused).reason
    worker.close("done")
    assert running.broker.refused == 2
