import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scripted import RunningBroker, broker_config

from databus.messages import Status
from echelon.observer import Observer
from echelon.run_folder import BusRecord

DEADLINE_S = 10.0


@pytest.fixture
def running() -> Iterator[RunningBroker]:
    with tempfile.TemporaryDirectory() as folder:
        broker = RunningBroker(broker_config(f"ipc://{folder}/s"))
        yield broker
        broker.stop()


def status_of(observer: Observer, *phases: str) -> Status:
    """The first of these phases."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        status = observer.poll()
        if status is not None and status.phase in phases:
            return status
        assert time.monotonic() < deadline and not observer.lost
        time.sleep(0.01)


def fail(_: Any = None) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(("ok", "phase", "error"), [(True, "finished", ""), (False, "failed", "the disk is gone")])
def test_a_broker_that_ends_is_not_asked_how_it_stands(
    running: RunningBroker, monkeypatch: pytest.MonkeyPatch, ok: bool, phase: str, error: str
) -> None:
    """It tells its observers, and waits for none of them: the next question may find nobody."""
    observer = Observer(BusRecord(address=running.broker.address, run_id="test"))
    status_of(observer, "starting")
    monkeypatch.setattr(observer, "_ask", lambda: None)
    if ok:
        running.stop()
    else:
        running.broker._turn = fail  # type: ignore[method-assign]
        running.join()
    ended = status_of(observer, phase)
    assert (ended.error, observer.lost) == (error, False)
    observer.close()


def test_a_run_of_which_nothing_else_was_heard_is_lost(running: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Observer, "_ask", lambda self: None)
    observer = Observer(BusRecord(address=running.broker.address, run_id="test"))
    running.stop()
    deadline = time.monotonic() + DEADLINE_S
    while not observer.lost:
        assert observer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    observer.close()
