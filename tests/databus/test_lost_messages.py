"""A message that is lost on the way is made good: by saying again where one stands."""

import time

import pytest
from scripted import (
    RunningBroker,
    ScriptedLearner,
    ScriptedWorker,
    broker_config,
    connect,
    receive,
    receives_nothing,
)

import databus.broker
import databus.lease_desk
from databus.client import BusClient
from databus.config import BusConfig
from databus.messages import Batch, BatchRequest, Credits, Holding, Lease, Refused, StepDone, Stop, VersionAnnounced

PATIENCE_S = 0.5
BUS = BusConfig(heartbeat_s=0.1, peer_timeout_s=2 * PATIENCE_S, lease_s=60.0)


def worker_with_a_lease(address: str) -> tuple[BusClient, Lease]:
    RunningBroker(broker_config(address, bus=BUS))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    return worker, receive(worker, Lease)


def test_lease_that_never_arrived_is_leased_again(address: str) -> None:
    worker, lease = worker_with_a_lease(address)
    time.sleep(PATIENCE_S)
    worker.send(Holding(group_ids=(), credits=1, version=0))
    again = receive(worker, Lease)
    assert (again.cursor, again.attempt) == (lease.cursor, 1)
    worker.close("done")


def test_lease_that_may_be_on_its_way_is_not(address: str) -> None:
    worker, _ = worker_with_a_lease(address)
    worker.send(Holding(group_ids=(), credits=1, version=0))
    assert receives_nothing(worker, Lease, PATIENCE_S / 2)
    worker.close("done")


def test_lease_that_is_worked_on_stays(address: str) -> None:
    worker, lease = worker_with_a_lease(address)
    time.sleep(PATIENCE_S)
    worker.send(Holding(group_ids=(lease.group_id,), credits=1, version=0))
    assert receives_nothing(worker, Lease)
    worker.close("done")


def test_lost_credits_are_said_again(address: str) -> None:
    worker, lease = worker_with_a_lease(address)
    worker.send(Holding(group_ids=(lease.group_id,), credits=2, version=0))
    assert receive(worker, Lease).cursor == lease.cursor + 1
    worker.close("done")


def test_lost_notice_of_a_version_is_said_again(address: str) -> None:
    RunningBroker(broker_config(address, bus=BUS, steps=10, max_staleness=0))
    worker, learner = connect(address, "w", "worker", max_sequences=4), ScriptedLearner(address)
    learner.publish(1)
    while receive(worker, VersionAnnounced).version < 1:
        pass
    worker.send(Credits(total=4))
    assert receives_nothing(worker, Lease), "what it serves is older than what it was told of"
    worker.send(Holding(group_ids=(), credits=4, version=1))
    receive(worker, Lease)
    for client in (worker, learner.client):
        client.close("done")


def test_version_nobody_announced_is_refused(address: str) -> None:
    worker, _ = worker_with_a_lease(address)
    worker.send(Holding(group_ids=(), credits=1, version=9))
    assert "version 9 is served, 0 is the newest announced" in receive(worker, Refused).reason
    worker.close("done")


def test_announcement_is_made_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databus.lease_desk, "ANNOUNCE_AGAIN_S", 0.3)
    RunningBroker(broker_config(address))
    worker, learner = connect(address, "w", "worker", max_sequences=4), ScriptedLearner(address)
    learner.publish(1)
    assert receive(worker, VersionAnnounced).version == 1
    assert receive(worker, VersionAnnounced).version == 1
    for client in (worker, learner.client):
        client.close("done")


def test_report_of_a_step_may_come_after_the_next_question(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=2))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.client.send(BatchRequest(step=0))
    receive(learner.client, Batch)
    learner.publish(1)
    learner.client.send(BatchRequest(step=1))  # the report of step 0 is lost
    assert receives_nothing(learner.client, Refused)
    learner.client.send(StepDone(step=0, metrics={}))
    learner.step(1)
    learner.finish()
    worker.join()
    running.join()
    assert running.failure is None


def test_stop_is_said_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databus.broker, "STOP_AGAIN_S", 0.2)
    running = RunningBroker(broker_config(address, steps=1))
    worker, learner = ScriptedWorker(address), ScriptedLearner(address)
    learner.step(0)
    receive(learner.client, Stop)
    receive(learner.client, Stop)
    learner.client.close("done")
    worker.join()
    running.join()
    assert running.failure is None
