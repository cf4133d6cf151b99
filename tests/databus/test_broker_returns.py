"""A broker is killed with SIGKILL, another reads its journal, and its peers come back to it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from broker_process import broker_process
from scripted import ScriptedLearner, ScriptedWorker, broker_config, connect, make_group, receive, send_group

from databus.broker import RETURN_S
from databus.client import BusClient
from databus.config import BrokerConfig, BusConfig
from databus.journal import read_journal
from databus.messages import Ack, Batch, BatchRequest, Credits, Holding, Lease, StepDone, Stop, Welcome
from databus.records import GroupCompleted, GroupLeased

BUS = BusConfig(heartbeat_s=0.1, peer_timeout_s=1.0, lease_s=30.0, reconnect_s=20.0)


class Brokers:
    """One broker after another, on the same journal."""

    def __init__(self, config: BrokerConfig, folder: Path, stack: ExitStack) -> None:
        self._config = config
        self._folder = folder
        self._stack = stack
        self.journal = folder / "journal"
        self.process = self._start()

    def _start(self) -> psutil.Process:
        return self._stack.enter_context(broker_process(self._config, self._folder / "log", self.journal))

    def replace(self) -> None:
        self.process.kill()
        self.process.wait(5)
        self.process = self._start()


@pytest.fixture
def brokers(address: str, tmp_path: Path) -> Iterator[Brokers]:
    with ExitStack() as stack:
        yield Brokers(broker_config(address, bus=BUS, steps=2), tmp_path, stack)


def come_back(client: BusClient) -> None:
    receive(client, Welcome, 10.0)


def test_worker_goes_on_with_its_lease(address: str, brokers: Brokers) -> None:
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    brokers.replace()
    come_back(worker)
    worker.send(Holding(group_ids=(lease.group_id,), credits=0, version=0))
    send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    assert receive(worker, Ack).accepted
    worker.send(Credits(total=1))
    assert receive(worker, Lease).cursor == lease.cursor + 1
    worker.close("done")


def test_lease_of_a_worker_that_does_not_come_back_goes_to_another(address: str, brokers: Brokers) -> None:
    first = connect(address, "first", "worker", max_sequences=4)
    first.send(Credits(total=1))
    lease = receive(first, Lease)
    first.close()
    brokers.replace()
    second = connect(address, "second", "worker", max_sequences=4)
    second.send(Credits(total=4))
    leases = [receive(second, Lease, 10.0) for _ in range(4)]
    assert (lease.cursor, 1) in [(each.cursor, each.attempt) for each in leases]
    second.close("done")


def test_acknowledged_group_is_there_and_a_copy_of_it_is_not_taken(address: str, brokers: Brokers) -> None:
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    group = make_group(lease.prompt_ids, [[0], [0]])
    send_group(worker, lease.group_id, group)
    receive(worker, Ack)
    brokers.replace()
    come_back(worker)
    send_group(worker, lease.group_id, group)  # as if the acknowledgement had been lost
    assert not receive(worker, Ack).accepted
    records = [entry.record for entry in read_journal(brokers.journal)]
    assert sum(isinstance(record, GroupCompleted) for record in records) == 1
    worker.close("done")


def test_batch_is_the_same(address: str, brokers: Brokers) -> None:
    worker, learner = connect(address, "w", "worker", max_sequences=4), ScriptedLearner(address)
    worker.send(Credits(total=2))
    for lease in [receive(worker, Lease), receive(worker, Lease)]:
        send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
    learner.client.send(BatchRequest(step=0))
    batch = receive(learner.client, Batch)
    brokers.replace()
    come_back(learner.client)
    learner.client.send(BatchRequest(step=0))
    assert receive(learner.client, Batch) == batch
    learner.client.send(StepDone(step=0, metrics={}))
    time.sleep(0.3)
    brokers.replace()
    come_back(learner.client)
    learner.client.send(BatchRequest(step=0))
    assert receive(learner.client, Batch) == batch, "also once the step is taken"
    for client in (worker, learner.client):
        client.close("done")


def test_peers_hear_of_the_end_from_a_broker_that_came_back_for_it(address: str, brokers: Brokers) -> None:
    worker, learner = connect(address, "w", "worker", max_sequences=4), ScriptedLearner(address)
    worker.send(Credits(total=4))
    for step in range(2):
        for lease in [receive(worker, Lease), receive(worker, Lease)]:
            send_group(worker, lease.group_id, make_group(lease.prompt_ids, [[0], [0]]))
        learner.step(step)
    receive(learner.client, Stop)  # so the last step is on the disk
    brokers.replace()
    come_back(learner.client)
    learner.client.send(StepDone(step=1, metrics={}))  # as the learner does: the report may have been lost
    assert receive(learner.client, Stop, 10.0).ok
    for client in (worker, learner.client):
        client.close("done")
    leased = [entry.record for entry in read_journal(brokers.journal) if isinstance(entry.record, GroupLeased)]
    assert len(leased) == 4


def test_a_learner_that_comes_back_after_the_last_step_takes_it_again(address: str, brokers: Brokers) -> None:
    """The last checkpoint was not whole, so the run is not over, however long the learner takes to load."""
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    batches = [learner.step(step) for step in range(2)]
    receive(learner.client, Stop)
    learner.client.close()
    brokers.replace()
    time.sleep(4 * BUS.heartbeat_s + RETURN_S)
    again = ScriptedLearner(address)
    assert [again.step(step) for step in range(2)] == batches
    again.finish()
    worker.join()


def test_a_learner_that_comes_back_with_the_last_version_has_nothing_left_to_do(address: str, brokers: Brokers) -> None:
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    for step in range(2):
        learner.step(step)
    receive(learner.client, Stop)
    learner.client.close()
    brokers.replace()
    ScriptedLearner(address, start_step=2).finish()
    worker.join()
    assert brokers.process.wait(10) == 0
