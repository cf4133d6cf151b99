"""The broker over real sockets: evaluations at the edges, groups nobody can train, another batch size on resume."""

from dataclasses import replace
from pathlib import Path

import pytest
from scripted import (
    RunningBroker,
    ScriptedLearner,
    ScriptedWorker,
    broker_config,
    connect,
    make_group,
    receive,
    send_group,
)

from databus.groups import Group, encode_group
from databus.journal import Journal
from databus.messages import (
    Ack,
    Batch,
    BatchRequest,
    Cancel,
    Completed,
    Credits,
    Lease,
    Position,
    StepDone,
)
from databus.prompts import Prompt

EVALS = [Prompt(f"e{i}", (9, i + 1), b"{}") for i in range(3)]


def test_last_version_is_evaluated_though_its_step_is_reported_first(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1, eval_every=1), EVALS)
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.client.send(BatchRequest(step=0))
    receive(learner.client, Batch)
    learner.client.send(StepDone(step=0, metrics={}))
    learner.publish(1)
    learner.finish()
    worker.join()
    running.join()
    assert [(row["step"], row["eval/accuracy"]) for row in running.sink.rows] == [(0, 1.0), (1, 1.0)]


def test_abandoned_evaluation_is_called_off_and_holds_nothing_up(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1, eval_every=5, eval_timeout_s=0.5), EVALS)
    learner = ScriptedLearner(address)
    worker = connect(address, "w", "worker", max_sequences=4)
    asked = {receive(worker, Lease).group_id for _ in EVALS}
    assert {receive(worker, Cancel).group_ids[0] for _ in EVALS} == asked
    for group_id, evaluated in zip(sorted(asked), EVALS, strict=True):
        send_group(worker, group_id, make_group(evaluated.prompt_ids, [[0]]))
        assert not receive(worker, Ack).accepted
    worker.send(Credits(total=2))
    for _ in range(2):
        lease = receive(worker, Lease)
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    learner.step(0)
    learner.finish()
    worker.close("done")
    running.join()
    assert running.failure is None
    assert "eval/accuracy" not in running.sink.rows[0]


def test_versions_that_a_returning_learner_passes_again_are_not_evaluated_again(address: str, tmp_path: Path) -> None:
    """It passes them as fast as it can, so they may be gone before any worker has got one."""
    config = broker_config(address, steps=5, max_staleness=0, eval_every=1)
    running = RunningBroker(config, EVALS, journal=Journal(tmp_path))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    batches = [learner.step(step) for step in range(4)]
    worker.client.close("gone")
    learner.client.close()
    again = ScriptedLearner(address)
    assert [again.step(step) for step in range(4)] == batches
    newcomer = ScriptedWorker(address, "worker-1")
    again.step(4)
    again.finish()
    newcomer.join()
    running.join()
    assert running.failure is None
    assert [row["step"] for row in running.sink.rows] == list(range(6))
    assert running.sink.rows[-1]["eval/accuracy"] == 1.0


@pytest.mark.parametrize("policy", ["drop", "mask", "requeue"])
def test_group_without_loss_is_stale_at_once_and_not_leased_again(address: str, policy: str) -> None:
    running = RunningBroker(broker_config(address, steps=1, batch_groups=1, max_staleness=0, stale_policy=policy))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=2))
    first = receive(worker, Lease)
    send_group(worker, first.group_id, make_group(first.prompt_ids, [[0], [0]], loss_mask=[0, 0]))
    second = receive(worker, Lease)
    assert (second.cursor, second.attempt) == (first.cursor + 1, 0)
    send_group(worker, second.group_id, make_group(second.prompt_ids, [[0], [0]]))
    learner = ScriptedLearner(address)
    assert [group.group_id for group in learner.step(0).groups] == [second.group_id]
    learner.finish()
    worker.close("done")
    running.join()
    assert running.sink.rows[0]["ledger/stale_groups"] == 1


class KeepBest:
    def keep(self, group: Group) -> bool:
        return float(group.rewards.sum()) > 1


def test_filtered_groups_are_refilled(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1, batch_groups=1, max_staleness=0), filters=[KeepBest()])
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=3))
    for reward in (0.0, 0.5, 2.0):
        lease = receive(worker, Lease)
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]], [reward, 0.0]))
    learner = ScriptedLearner(address)
    assert [group.group_id for group in learner.step(0).groups] == [lease.group_id]
    learner.finish()
    worker.close("done")
    running.join()
    row = running.sink.rows[0]
    assert (row["ledger/filtered_groups"], row["ledger/trained_groups"]) == (2, 1)


@pytest.mark.parametrize("batch_groups", [2, 5])
def test_run_goes_on_with_another_batch_size(address: str, batch_groups: int) -> None:
    """Admission counts in batches; 40 trained groups are ten of the old ones, not twenty or eight of the new."""
    counts = {"trained": 40, "stale": 0, "filtered": 0, "failed": 0, "expired": 0}
    position = Position(step=10, next_cursor=40, pending=(), counts=counts)
    config = broker_config(address, start_step=10, steps=12, batch_groups=batch_groups, max_staleness=0)
    running = RunningBroker(config, position=position)
    worker, learner = ScriptedWorker(address, credit=20), ScriptedLearner(address, start_step=10)
    for step in (10, 11):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join()
    assert len(worker.leases) == 2 * batch_groups
    assert all(version == 10 + index // batch_groups for index, (version, _) in enumerate(worker.leases))
    assert running.sink.rows[-1]["ledger/trained_groups"] == 40 + 2 * batch_groups


def test_part_of_a_reward_cannot_hide_its_mean(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=1, batch_groups=1))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    group = make_group(lease.prompt_ids, [[0], [0]], [1.0, 0.0])
    heads, frames = encode_group(replace(group, reward_parts=group.reward_parts + 6))
    worker.send(Completed(group_id=lease.group_id, columns=heads, reward_names=("mean",)), frames)
    learner = ScriptedLearner(address)
    learner.step(0)
    learner.finish()
    worker.close("done")
    running.join()
    assert running.sink.rows[0]["reward/mean"] == 0.5
