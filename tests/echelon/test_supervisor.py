"""Runs that fail, and processes that are killed: one line, the right exit code, nobody left."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RAISING = "def reward(sample):\n    raise RuntimeError('no gold answer')\n"
# Importing it works in `prepare`, and not in a worker's scoring process.
UNLOADABLE = """
import multiprocessing
if multiprocessing.parent_process() is not None:
    raise ImportError("no such library here")
def reward(sample):
    return 1.0
"""


def fails(run, code: int) -> str:
    """The one line that a failing run ends with."""
    actual, _, stderr = run.finish()
    assert actual == code, (stderr, run.logs())
    assert stderr.startswith("echelon: ")
    assert stderr.count("\n") == 1, stderr
    assert run.survivors() == []
    return stderr


def test_reward_that_raises_stops_the_run_and_is_named(write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path, RAISING), tmp_path / "run", "eval.every=0")
    line = fails(run, 1)
    assert re.search(r"the reward failed for \d groups in a row", line)
    assert "recipe.py:reward" in line
    assert "RuntimeError: no gold answer" in line
    assert line.startswith("echelon: broker: ")


def test_worker_that_cannot_start(write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path, UNLOADABLE), tmp_path / "run")
    line = fails(run, 2)
    assert "no such library here" in line


def test_port_in_use(write_recipe, start_run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        run = start_run(write_recipe(tmp_path), tmp_path / "run", f"bus.address={address}")
        line = fails(run, 2)
    assert f"cannot listen on bus.address={address}" in line


def test_killed_worker_is_replaced_and_killed_supervisor_leaves_nobody(write_recipe, start_run, tmp_path: Path) -> None:
    run = start_run(write_recipe(tmp_path), tmp_path / "run", "learner.steps=10000", "eval.every=0")
    run.wait_for(lambda: len(run.rows()) >= 2)
    first = run.role("echelon.roles.worker")
    first.send_signal(signal.SIGKILL)
    before = len(run.rows())
    # What was queued may still be trained: more than that needs a worker.
    run.wait_for(lambda: len(run.rows()) >= before + 6)
    assert run.role("echelon.roles.worker").pid != first.pid
    run.look()
    run.process.kill()
    started = time.monotonic()
    assert run.survivors() == []
    assert time.monotonic() - started < 10
    stdout, _ = run.process.communicate()
    assert "worker-0 was killed by SIGKILL (out of memory, perhaps): starting it again (1 of 3)" in stdout


def test_a_worker_that_comes_back_too_late_holds_nothing_up(write_recipe, start_run, tmp_path: Path) -> None:
    """One worker's steps are over before the other has started again; no broker is there then to tell it so."""
    settings = ("learner.steps=12", "eval.every=0", "rollout.workers=2")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2)
    run.role("echelon.roles.worker", "worker-1").send_signal(signal.SIGKILL)
    run.wait_for(lambda: len(run.rows()) == 12)
    ended = time.monotonic()
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    assert "worker-1 was killed by SIGKILL" in stdout
    assert "did not end with the run" not in stdout
    assert time.monotonic() - ended < 40, stdout
    assert run.survivors() == []
