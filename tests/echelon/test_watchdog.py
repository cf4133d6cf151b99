"""Who holds a run up, and that the run says so when it ends."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from databus.messages import Status, WorkerStatus
from echelon.watchdog import RoleProcess, diagnose

HANGING = "import time\ndef reward(sample):\n    time.sleep(1000)\n"
SLEEPING_LEARNER = """
import sys
if "echelon.roles.learner" in sys.orig_argv:
    import time
    from learner.train_step import TrainStep
    def sleep(self, *args):
        time.sleep(1000)
    TrainStep.__call__ = sleep
"""
SETTINGS = ("watchdog_s=4", "eval.every=0", "learner.steps=10000")

slow = pytest.mark.slow


def process(role: str, state: str = psutil.STATUS_SLEEPING) -> RoleProcess:
    return RoleProcess(role, 7, state, cpu_s=1.0, memory_bytes=1 << 20)


def worker(name: str, **changes: Any) -> WorkerStatus:
    values: dict[str, Any] = {
        "name": name,
        "version": 1,
        "leased_groups": 0,
        "running_sequences": 0,
        "tokens_per_s": 0.0,
        "silent_s": 1.0,
    }
    return WorkerStatus(**values | changes)


def status(*workers: WorkerStatus, **changes: Any) -> Status:
    values: dict[str, Any] = {
        "phase": "running",
        "step": 5,
        "steps": 9,
        "version": 5,
        "learner_ready": True,
        "workers": workers,
        "running_groups": 0,
        "queued_groups": 2,
        "counts": {},
        "last_progress_s": 60.0,
    }
    return Status(**values | changes)


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (status(worker("w", leased_groups=4)), "w holds 4 groups and generates nothing: it waits for the reward"),
        (
            status(worker("w", leased_groups=1, running_sequences=8)),
            "w holds 1 group and its engine, with 8 sequences, gives no tokens",
        ),
        (
            status(worker("w", leased_groups=1, running_sequences=8, tokens_per_s=30.0)),
            "w holds 1 group and generates 30 tokens/s",
        ),
        (status(worker("w", silent_s=12.0), worker("v")), "w has not been heard for 12 s"),
        (status(worker("w"), training_s=61.0), "the learner has had the batch of step 5 for 61 s"),
        (status(), "no worker is left"),
        (
            status(worker("w", silent_s=12.0), disk_full="[Errno 28] No space left on device: '000001.log'"),
            "the broker cannot write its journal: [Errno 28] No space left on device: '000001.log'",
        ),
        (
            status(worker("w"), requested=True),
            "no worker holds a group, 2 are queued, the learner waits for a batch",
        ),
    ],
)
def test_whoever_has_something_to_do_and_does_not_is_named(seen: Status, cause: str) -> None:
    assert diagnose([process("worker-0")], seen, 0.2) == cause


def test_what_is_certain_comes_first() -> None:
    stopped = [process("broker"), process("learner", psutil.STATUS_STOPPED)]
    assert diagnose(stopped, status(training_s=9.0), 60.0) == "learner (pid 7) is stopped (SIGSTOP)"
    assert diagnose([process("broker")], status(training_s=9.0), 60.0) == "the broker has not answered for 60 s"
    assert diagnose([process("broker")], None, 60.0) == "the broker has not answered for 60 s"


def test_who_has_a_shared_device_is_named_and_nobody_who_waits_for_it() -> None:
    asleep = worker("w", leased_groups=1, running_sequences=8)
    seen = status(asleep, training_s=61.0)
    assert diagnose([process("worker-0")], seen, 0.2, "the learner has the device") == (
        "the learner has the device; it has had the batch of step 5 for 61 s"
    )
    wanted = "the learner wants the device, and w did not give it up"
    assert diagnose([process("worker-0")], seen, 0.2, wanted).startswith(wanted)


def ending(run: Any) -> tuple[str, str]:
    """(the one line that the run ends with, the report)."""
    code, _, stderr = run.finish()
    assert code == 1, (stderr, run.logs())
    assert stderr.startswith("echelon: no progress for ") and stderr.count("\n") == 1, stderr
    assert "(watchdog_s=4)" in stderr
    assert run.survivors() == []
    return stderr, (run.folder / "logs" / "watchdog.log").read_text()


@slow
@pytest.mark.timeout(600)
def test_hung_reward_is_named(write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path, HANGING), tmp_path / "run", "reward.timeout_s=1000", *SETTINGS)
    line, report = ending(run)
    assert "worker-0 holds" in line and "it waits for the reward" in line
    assert "in reward" in report.partition("stacks of worker-0:")[2], report
    for role in ("broker", "worker-0", "learner"):
        assert f"{role}: pid " in report
        assert "most recent call first" in report.partition(f"stacks of {role}:")[2], report
        assert "most recent call first" in (run.folder / "logs" / f"{role}.log").read_text(), role
    assert "queues: " in report and "worker-0: working, version 0, holds" in report


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("role", "name"), [("worker", "worker-0"), ("broker", "broker")])
def test_stopped_process_is_named(write_recipe, start_run, tmp_path: Path, role: str, name: str) -> None:
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *SETTINGS)
    run.wait_for(lambda: len(run.rows()) >= 2)
    stopped = run.role(f"echelon.roles.{role}")
    stopped.send_signal(signal.SIGSTOP)
    line, report = ending(run)
    assert f"{name} (pid {stopped.pid}) is stopped (SIGSTOP)" in line
    assert f"{name}: pid {stopped.pid}, stopped" in report
    if role == "broker":  # a worker's scoring processes answer for themselves
        assert "nothing: it does not answer signals" in report.partition("stacks of broker:")[2]


@slow
@pytest.mark.timeout(600)
def test_sleeping_learner_is_named(write_recipe, start_run, tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(SLEEPING_LEARNER)
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *SETTINGS, python_path=tmp_path / "path")
    line, report = ending(run)
    assert "the learner has had the batch of step 0 for " in line
    assert "sitecustomize.py" in report.partition("stacks of learner:")[2]
