"""Whole runs whose learner and engines take turns on one device."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from databus.turns import Side, who_has
from echelon.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
COLOCATED = "placement=colocated"
SLEEPLESS = """
import sys
if "echelon.roles.worker" in sys.orig_argv:
    import asyncio
    from rollout.engine.small_engine import SmallEngine
    async def stay_awake(self):
        await asyncio.sleep(1000)
    SmallEngine.sleep = stay_awake
"""


class Turn(NamedTuple):
    """begin_s, end_s: on the machine's monotonic clock; end_s is infinite for one that was never given up."""

    side: str
    who: str
    pid: int
    begin_s: float
    end_s: float


def read_turns(run_folder: Path, killed: dict[int, float] | None = None) -> list[Turn]:
    """By their begin. Args: killed: when processes were, whose turns have no end of their own."""
    lines = (run_folder / "turns" / "record.jsonl").read_text().splitlines()
    turns: list[Turn] = []
    open_since: dict[tuple[str, int], float] = {}
    for event in map(json.loads, lines):
        key = event["who"], event["pid"]
        if event["event"] == "takes":
            assert key not in open_since
            open_since[key] = event["at_s"]
        else:
            turns.append(_turn(event, open_since.pop(key), event["at_s"]))
    for (who, pid), begin in open_since.items():
        turns.append(_turn({"who": who, "pid": pid}, begin, (killed or {}).get(pid, math.inf)))
    return sorted(turns, key=lambda turn: turn.begin_s)


def overlaps(turns: list[Turn]) -> list[tuple[Turn, Turn]]:
    """A turn of the learner and one of an engine that have a moment in common."""
    learner = [turn for turn in turns if turn.side == "learner"]
    engines = [turn for turn in turns if turn.side == "engines"]
    return [(a, b) for a in learner for b in engines if a.begin_s < b.end_s and b.begin_s < a.end_s]


def _turn(event: dict[str, Any], begin_s: float, end_s: float) -> Turn:
    return Turn(event["who"].partition("/")[0], event["who"], event["pid"], begin_s, end_s)


def echelon(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "echelon", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def audit(folder: Path) -> None:
    result = echelon("audit", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("max_staleness", "ranks", "workers"), [(0, 1, 2), (2, 2, 1)])
def test_sides_never_compute_at_the_same_time(
    write_recipe, start_run, tmp_path: Path, max_staleness: int, ranks: int, workers: int
) -> None:
    settings = (f"max_staleness={max_staleness}", f"learner.ranks={ranks}", f"rollout.workers={workers}")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", COLOCATED, *settings)
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    steps = [row for row in run.rows() if "loss/policy" in row]
    assert [row["step"] for row in steps] == list(range(6))
    assert [row["step"] for row in run.rows() if "eval/accuracy" in row] == [0, 3, 6]
    assert max(row["staleness/max_versions"] for row in steps) <= max_staleness
    assert all(row["learner/turn_wait_s"] >= 0 for row in steps)
    assert run.survivors() == []
    audit(run.folder)

    turns = read_turns(run.folder)
    assert overlaps(turns) == []
    assert {turn.who for turn in turns} == {
        *(f"learner/{rank}" for rank in range(ranks)),
        *(f"engines/worker-{index}" for index in range(workers)),
    }
    if max_staleness == 0:  # no batch without a turn of the engines before it
        assert sum(turn.side == "learner" for turn in turns) >= 6


def test_a_turn_dies_with_who_has_it(write_recipe, start_run, tmp_path: Path) -> None:
    """The learner is killed in its turn, and then the worker in its own."""
    run = start_run(
        write_recipe(tmp_path), tmp_path / "run", COLOCATED, "learner.steps=24", "learner.checkpoint_every=3"
    )
    killed: dict[int, float] = {}
    victims: tuple[tuple[str, Side, str], ...] = (("learner", "learner", "0"), ("worker", "engines", "worker-0"))
    for role, side, name in victims:
        steps = len(run.rows()) + 3
        run.wait_for(lambda steps=steps: len(run.rows()) >= steps)
        process = run.role(f"echelon.roles.{role}")
        killed[process.pid] = kill_in_its_turn(process, run.folder / "turns", side, name)
    stranger = echelon("worker", "--join", bus.address) if (bus := RunFolder(run.folder).bus()) else None
    assert stranger and "is colocated: its workers share the learner's machine; join it there" in stranger.stderr
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    assert stdout.count("starting it again") == 2, stdout
    assert [row["step"] for row in run.rows() if "loss/policy" in row] == list(range(24))
    assert run.survivors() == []
    audit(run.folder)
    turns = read_turns(run.folder, killed)
    assert overlaps(turns) == []
    assert {turn.pid for turn in turns} >= set(killed)


def test_an_engine_that_keeps_the_device_is_named(write_recipe, start_run, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLEEPLESS)
    settings = ("watchdog_s=4", "eval.every=0")
    run = start_run(write_recipe(tmp_path), tmp_path / "run", COLOCATED, *settings, python_path=site)
    code, _, stderr = run.finish()
    assert code == 1, run.logs()
    assert "the learner wants the device, and worker-0 did not give it up; it " in stderr
    assert run.survivors() == []


def test_vllm_takes_turns(write_recipe, start_run, tmp_path: Path) -> None:
    settings = (
        "rollout.engine=vllm",
        "rollout.context_tokens=256",
        "rollout.max_tokens=224",  # long completions: some are under way whenever a turn ends
        "learner.steps=4",
        "eval.every=2",
        "learner.lr=1e-4",
    )
    run = start_run(write_recipe(tmp_path), tmp_path / "run", COLOCATED, *settings)
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    steps = [row for row in run.rows() if "loss/policy" in row]
    assert [row["step"] for row in steps] == list(range(4))
    assert max(row["staleness/max_versions"] for row in steps) <= 2
    lag0 = [row["mismatch/kl_lag0"] for row in steps if "mismatch/kl_lag0" in row]
    assert lag0 and max(lag0) < 1e-4
    assert run.survivors() == []
    audit(run.folder)
    turns = read_turns(run.folder)
    assert overlaps(turns) == []
    assert {turn.who for turn in turns} == {"learner/0", "engines/worker-0"}


def kill_in_its_turn(process: psutil.Process, turns: Path, side: Side, name: str) -> float:
    """Stops it, looks whether it has the device, and lets it go on where it has not. Returns: when it was killed."""
    deadline = time.monotonic() + 60.0
    while True:
        process.suspend()
        if name in who_has(turns, side):
            break
        process.resume()
        assert time.monotonic() < deadline
        time.sleep(0.003)
    killed_at = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10.0)
    return killed_at
