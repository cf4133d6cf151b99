"""The broker over real sockets, with something to schedule by."""

from collections.abc import Callable, Sequence, Set

import pytest
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

from databus import peers
from databus.client import BusClient
from databus.groups import Group
from databus.messages import (
    Ack,
    Credits,
    Heartbeat,
    Lease,
    Position,
    PositionRequest,
    Stop,
    VersionAnnounced,
    VersionApplied,
)
from databus.run_state import RunFailed
from databus.scheduling import Load, Rank


class Recorder:
    """A scheduler that predicts ten tokens more for each cursor."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self.steps: list[tuple[list[int], set[int]]] = []

    def predicted_tokens(self, cursor: int) -> int:
        return 10 * cursor

    def completed(self, cursor: int, group: Group) -> None:
        self.groups.append(cursor)

    def stepped(self, trained: Sequence[int], still_open: Set[int]) -> dict[str, float]:
        self.steps.append((list(trained), set(still_open)))
        return {"difficulty/steps": len(self.steps)}

    def load(self, saved: bytes) -> None: ...

    def save(self) -> bytes:
        return b"state"


class OddRewards:
    def keep(self, group: Group) -> bool:
        return bool(group.rewards[0] % 2)


class Nothing:
    def keep(self, group: Group) -> bool:
        return False


def test_the_scheduler_hears_of_every_cursor(address: str) -> None:
    scheduler = Recorder()
    running = RunningBroker(broker_config(address, steps=3), scheduler=scheduler)
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.step(0)
    learner.client.send(PositionRequest(step=1))
    assert receive(learner.client, Position).scheduling == b"state"
    for step in (1, 2):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join()
    assert all(lease.predicted_tokens == 10 * lease.cursor for _, lease in worker.leases)
    assert sorted(scheduler.groups) == list(range(6))
    assert sorted(cursor for trained, _ in scheduler.steps for cursor in trained) == list(range(6))
    done: set[int] = set()
    for trained, still_open in scheduler.steps:
        done |= set(trained)
        assert not done & still_open
    assert [row["difficulty/steps"] for row in running.sink.rows] == [1, 2, 3]


def test_filtered_groups_tell_of_difficulty_as_well(address: str) -> None:
    scheduler = Recorder()
    running = RunningBroker(
        broker_config(address, steps=1, max_staleness=0, batch_groups=1), scheduler=scheduler, filters=[OddRewards()]
    )
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]], rewards=[2.0, 2.0]))
    assert receive(worker, Ack).accepted
    worker.send(Credits(total=2))
    second = receive(worker, Lease)
    send_group(worker, second.group_id, make_group(second.prompt_ids, [[0], [0]], rewards=[1.0, 1.0]))
    learner = ScriptedLearner(address)
    learner.step(0)
    worker.close("done")
    learner.finish()
    running.join()
    assert scheduler.groups == [0, 1]
    assert scheduler.steps == [([1], set())]


class Fullest:
    """Sends all to the worker with the most to do, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Load] = []

    def ranking(self, loads: Sequence[Load]) -> Callable[[Load], Rank]:
        return self._rank

    def _rank(self, load: Load) -> Rank:
        self.seen.append(load)
        return (-load.predicted_tokens,)


def test_placement_decides_who_gets_the_next_group(address: str) -> None:
    placement = Fullest()
    RunningBroker(broker_config(address, batch_groups=4, max_staleness=0), scheduler=Recorder(), placement=placement)
    first, second = (connect(address, name, "worker", max_sequences=8) for name in ("first", "second"))
    first.send(Credits(total=1))
    assert receive(first, Lease).cursor == 0
    second.send(Credits(total=2))
    leases = [receive(second, Lease) for _ in range(2)]
    second.send(Heartbeat(generated_tokens=7))
    first.send(Credits(total=2))
    receive(first, Lease)
    assert [lease.cursor for lease in leases] == [1, 2]
    # Predictions are of whole groups: two completions each of 10 and of 20 tokens.
    may_lease = [load for load in placement.seen if load.free_groups]
    assert max(load.predicted_tokens for load in may_lease) == 2 * 10
    assert {load.free_groups for load in may_lease} <= {1, 2}
    for client in (first, second):
        client.close("done")


def test_a_run_in_which_every_group_is_filtered_ends(address: str) -> None:
    running = RunningBroker(broker_config(address, max_filtered=5, steps=1), filters=[Nothing()])
    worker = connect(address, "w", "worker", max_sequences=8)
    for total in range(1, 6):
        worker.send(Credits(total=total))
        lease = receive(worker, Lease)
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    stop = receive(worker, Stop)
    assert not stop.ok
    worker.close("done")
    running.join()
    assert isinstance(running.failure, RunFailed)
    assert str(running.failure).startswith(
        "5 groups in a row (2.5 batches) were dropped, none kept: 5 by Nothing; rewards were 0 to 1, at most 1 apart"
    )


def test_a_run_of_empty_completions_ends(address: str) -> None:
    """They bear no loss: each group is settled at once, and no batch would ever be cut."""
    running = RunningBroker(broker_config(address, max_filtered=3, steps=1))
    worker = connect(address, "w", "worker", max_sequences=8)
    for total in range(1, 4):
        worker.send(Credits(total=total))
        lease = receive(worker, Lease)
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[], []], rewards=[0.5, 0.5]))
    stop = receive(worker, Stop)
    assert not stop.ok
    assert stop.reason.startswith(
        "3 groups in a row (1.5 batches) were dropped, none kept: 3 having no token that bears loss; rewards were "
        "0.5 to 0.5, at most 0 apart within a group"
    )
    worker.close("done")
    running.join()


def test_a_group_that_is_kept_starts_the_count_anew(address: str) -> None:
    running = RunningBroker(broker_config(address, max_filtered=2, steps=1, batch_groups=3), filters=[OddRewards()])
    worker = connect(address, "w", "worker", max_sequences=8)
    for total, reward in enumerate([2.0, 1.0, 2.0, 1.0, 2.0, 1.0], start=1):
        worker.send(Credits(total=total))
        lease = receive(worker, Lease)
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]], rewards=[reward, 0.0]))
    learner = ScriptedLearner(address)
    learner.step(0)
    learner.finish()
    worker.close("done")
    running.join()
    assert running.failure is None
    assert running.sink.rows[0]["ledger/filtered_groups"] == 3


def two_workers_told_of_version_1(address: str) -> tuple[ScriptedLearner, list[BusClient]]:
    """On policy, four groups a batch; both have served version 0, and have room for four groups each."""
    RunningBroker(broker_config(address, batch_groups=4, max_staleness=0))
    workers = [connect(address, name, "worker", max_sequences=8) for name in ("first", "second")]
    for worker in workers:
        worker.send(Credits(total=2))
    leases = [(worker, receive(worker, Lease)) for worker in workers for _ in range(2)]
    for worker, lease in leases:
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    for worker in workers:
        worker.send(Credits(total=6))
    learner = ScriptedLearner(address)
    learner.step(0)
    for worker in workers:
        receive(worker, VersionAnnounced)
    return learner, workers


def test_whoever_serves_a_version_first_leaves_the_others_their_share(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LATE_S", 30.0)  # on a busy machine the second may take its time
    learner, (first, second) = two_workers_told_of_version_1(address)
    for worker in (first, second):
        worker.send(VersionApplied(version=1))
        for _ in range(2):
            receive(worker, Lease)
    assert all(receives_nothing(worker, Lease, 0.3) for worker in (first, second))
    for worker in (first, second):  # the leases of one that goes are another's
        worker.close("done")
    learner.client.close("done")


def test_nobody_waits_for_one_that_is_late(address: str) -> None:
    learner, (first, second) = two_workers_told_of_version_1(address)
    first.send(VersionApplied(version=1))
    assert len({receive(first, Lease).group_id for _ in range(4)}) == 4  # the whole batch
    assert receives_nothing(second, Lease, 0.2)
    for worker in (first, second):
        worker.close("done")
    learner.client.close("done")
