"""Versions that an engine's mismatch gate refuses, over real sockets: who works on, what is said, when the run ends."""

import time
from collections.abc import Callable

from scripted import BEYOND, PASSED, RunningBroker, ScriptedLearner, ScriptedWorker, broker_config, connect, receive

from databus.messages import BatchRequest, Refused, Status, StatusRequest, VersionRefused
from databus.prompts import Prompt
from databus.run_state import RunFailed

EVALS = [Prompt(f"e{i}", (9, i + 1), b"{}") for i in range(3)]
WHY = "KL 0.5"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_old_version_serves_on_and_the_run_says_so(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=4, max_staleness=2))
    worker, learner = ScriptedWorker(address, refuses={2}), ScriptedLearner(address)
    observer = connect(address, "observer", "observer")
    for step in range(4):
        learner.step(step)
    observer.send(StatusRequest())
    assert receive(observer, Status).refusal == (f"version 2 refused by worker-0, which serves version 1 still: {WHY}")
    learner.finish()
    worker.join()
    observer.close("done")
    running.join()
    assert running.failure is None
    rows = running.sink.rows
    assert max(row["staleness/max_versions"] for row in rows) <= 2
    assert [row["gate/refused_versions"] for row in rows] == sorted(row["gate/refused_versions"] for row in rows)
    assert rows[-1]["gate/refused_versions"] == 1
    assert max(row["gate/kl"] for row in rows) == BEYOND.kl
    assert max(row["gate/difference"] for row in rows) == BEYOND.difference
    assert min(row["gate/kl"] for row in rows) in (PASSED.kl, 0.0)


def test_where_nothing_can_be_trained_without_the_version_the_run_ends_at_once(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=4, max_staleness=0))
    ScriptedWorker(address, refuses={2})
    learner = ScriptedLearner(address)
    learner.step(0)
    learner.step(1)
    learner.client.send(BatchRequest(step=2))
    running.join()
    assert isinstance(running.failure, RunFailed)
    assert (
        str(running.failure) == f"version 2 was refused, and max_staleness=0 leaves nothing to train on without: {WHY}"
    )


def test_a_version_that_is_still_being_published_may_be_served(address: str) -> None:
    """The learner asks for its next batch meanwhile; what was refused before is not the last word."""
    running = RunningBroker(broker_config(address, steps=4, max_staleness=1))
    worker, learner = ScriptedWorker(address, refuses={1, 2}), ScriptedLearner(address)
    learner.step(0)
    wait_for(lambda: 1 in worker.refused)
    learner.step(1, publishes=False)
    learner.client.send(BatchRequest(step=2))
    time.sleep(0.5)  # nothing is left to train on, or to begin
    assert running.failure is None
    learner.publish(2)
    running.join()
    assert str(running.failure).startswith("versions 1, 2 were refused, and max_staleness=1 leaves nothing")


def test_a_resumed_run_cannot_go_on_with_the_initial_model(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=4, start_step=2, max_staleness=8))
    ScriptedWorker(address, refuses={2})
    learner = ScriptedLearner(address, start_step=2)
    learner.client.send(BatchRequest(step=2))
    running.join()
    assert isinstance(running.failure, RunFailed)
    assert "version 2 was refused, and max_staleness=8 leaves nothing" in str(running.failure)


def test_three_versions_in_a_row_end_the_run(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=9, max_staleness=8))
    worker, learner = ScriptedWorker(address, refuses=range(2, 99)), ScriptedLearner(address)
    learner.publish(1)
    for version in (2, 3, 4):
        learner.publish(version)
        wait_for(lambda version=version: version in worker.refused)
    running.join()
    assert isinstance(running.failure, RunFailed)
    assert str(running.failure) == f"versions 2, 3, 4 were refused in a row, none served: {WHY}"


def test_a_worker_whose_engine_is_wrong_does_not_end_a_run_that_others_serve(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=6, max_staleness=1))
    wrong = ScriptedWorker(address, "wrong", refuses=range(99))
    right, learner = ScriptedWorker(address, "right"), ScriptedLearner(address)
    for step in range(6):
        learner.step(step)
    learner.finish()
    right.join()
    wrong.join()
    running.join()
    assert running.failure is None
    assert running.sink.rows[-1]["gate/refused_versions"] >= 3


def test_a_version_that_nobody_serves_is_not_evaluated(address: str) -> None:
    running = RunningBroker(broker_config(address, steps=3, max_staleness=2, eval_every=1, eval_timeout_s=60.0), EVALS)
    worker, learner = ScriptedWorker(address, refuses={1, 3}), ScriptedLearner(address)
    for step in range(3):
        learner.step(step)
    learner.finish()
    worker.join()
    running.join(10.0)
    assert running.failure is None
    assert [row["step"] for row in running.sink.rows if "eval/accuracy" in row] == [0, 2]
    assert [row["step"] for row in running.sink.rows] == [0, 1, 2, 3]


def test_only_a_version_that_was_announced_can_be_refused(address: str) -> None:
    RunningBroker(broker_config(address))
    ScriptedLearner(address)
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(VersionRefused(version=7, mismatch=BEYOND, reason=WHY))
    assert "version 7 is refused, 0 is the newest announced" in receive(worker, Refused).reason
