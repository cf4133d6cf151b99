"""Workers that are lost or too slow, and who takes their place."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echelon.replacements import MAX_RESTARTS, Replacements

SLOW_WORKER = """
import sys
words = open("/proc/self/cmdline").read().split("\\0")
if "worker-2" in words:
    import time
    from rollout.engine.small_group import RunningGroup
    step = RunningGroup.step
    def slow_step(self, version):
        time.sleep(0.3)
        return step(self, version)
    RunningGroup.step = slow_step
"""


class FakeChild(SimpleNamespace):
    def kill(self) -> None:
        self.killed = True


def child(started: float) -> Any:
    return FakeChild(started=started, killed=False)


def test_each_worker_is_started_again_a_few_times() -> None:
    replacements = Replacements(patience_s=1.0)
    for count in range(MAX_RESTARTS):
        assert replacements.may_restart("worker-0")
        assert replacements.restarted("worker-0") == count + 1
    assert not replacements.may_restart("worker-0")
    assert replacements.may_restart("worker-1")


def test_who_is_sent_away_and_stays_is_ended_but_not_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    replacements = Replacements(patience_s=10.0)
    children = {"worker-0": child(started=0.0), "worker-1": child(started=0.0)}
    replacements.take({"worker-0": "slow"}, children)
    now = 109.0
    replacements.take({"worker-0": "slow"}, children)
    assert not children["worker-0"].killed
    now = 111.0
    replacements.take({"worker-0": "slow"}, children)
    assert children["worker-0"].killed and not children["worker-1"].killed
    children["worker-0"] = child(started=112.0)
    now = 200.0
    replacements.take({"worker-0": "slow"}, children)
    assert not children["worker-0"].killed
    replacements.take({}, children)
    assert replacements.drained == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_spare_takes_the_place_of_a_worker_that_was_killed(write_recipe, start_run, tmp_path: Path) -> None:
    settings = ("rollout.spares=1", "bus.heartbeat_s=0.5", "learner.steps=10000", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2 and run.worker("worker-1") is not None)
    run.wait_for(lambda: run.worker("worker-1").standing == "spare" and run.worker("worker-1").leased_groups == 0)
    first = run.role("echelon.roles.worker", "worker-0")
    first.send_signal(signal.SIGKILL)
    run.wait_for(lambda: run.worker("worker-1").standing == "working")
    run.wait_for(lambda: (back := run.worker("worker-0")) is not None and back.leased_groups > 0)
    run.wait_for(lambda: run.worker("worker-1").standing == "spare")
    assert run.role("echelon.roles.worker", "worker-0").pid != first.pid
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
    assert run.survivors() == []


@pytest.mark.slow
@pytest.mark.chaos_long
@pytest.mark.timeout(600)
def test_slow_worker_is_sent_away_and_replaced(write_recipe, start_run, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(SLOW_WORKER)
    settings = ("rollout.workers=3", "bus.slow_s=2", "rollout.drain_s=2", "learner.steps=100000", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings, python_path=tmp_path / "path")
    run.wait_for(lambda: len(run.rows()) >= 1)
    slow = run.role("echelon.roles.worker", "worker-2")
    run.wait_for(lambda: "worker-2" in run.status().drained)
    run.wait_for(lambda: (back := run.worker("worker-2")) is not None and back.standing == "working")
    assert run.role("echelon.roles.worker", "worker-2").pid != slow.pid
    run.wait_for(lambda: any("slow/worker-2_tokens_per_s" in row for row in run.rows()))
    run.process.send_signal(signal.SIGINT)
    code, stdout, _ = run.finish()
    assert code == 130
    assert "worker-2 was sent away (slow: " in stdout and "starting it again (1 of 3)" in stdout
