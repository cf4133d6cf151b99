"""Turns between real processes: nobody computes beside the other side, and nobody takes a turn to the grave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from databus.turns import RECORD, EngineTurn, Flag, LearnerTurn, TurnError, explain, who_has

ROOT = Path(__file__).resolve().parents[2]
LEARNER = """
import random, sys, time
from pathlib import Path
from databus.turns import LearnerTurn

turn = LearnerTurn(Path(sys.argv[1]), int(sys.argv[2]), 30.0)
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    turn.take()
    time.sleep(random.uniform(0, 0.01))
    turn.give()
    time.sleep(random.uniform(0, 0.02))
"""
ENGINE = """
import random, sys, time
from pathlib import Path
from databus.turns import EngineTurn

turn = EngineTurn(Path(sys.argv[1]), sys.argv[2])
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    if turn.try_take():
        while time.monotonic() < end and not turn.is_wanted:
            time.sleep(random.uniform(0, 0.005))
        turn.give()
    time.sleep(random.uniform(0, 0.002))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """(program, *words) -> a process that runs it."""
    processes: list[subprocess.Popen[str]] = []

    def start(program: str, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_ranks_and_three_engines_never_have_the_device_at_once(start: Start, tmp_path: Path) -> None:
    seconds = 3.0
    processes = [start(LEARNER, tmp_path, rank, seconds) for rank in range(2)]
    processes += [start(ENGINE, tmp_path, f"worker-{index}", seconds) for index in range(3)]
    assert [process.wait(30.0) for process in processes] == [0] * 5, [p.communicate() for p in processes]
    has: set[str] = set()
    turns = {"learner": 0, "engines": 0}
    events = [json.loads(line) for line in (tmp_path / RECORD).read_text().splitlines()]
    for event in sorted(events, key=lambda event: event["at_s"]):
        side = event["who"].partition("/")[0]
        if event["event"] == "takes":
            assert all(other.startswith(side) for other in has), (has, event)
            has.add(event["who"])
            turns[side] += 1
        else:
            has.remove(event["who"])
    assert not has
    assert min(turns.values()) > 20


@pytest.mark.parametrize("side", ["learner", "engines"])
def test_a_turn_dies_with_its_process(start: Start, tmp_path: Path, side: str) -> None:
    program, name = (LEARNER, "0") if side == "learner" else (ENGINE, "worker-0")
    holder = start(program.replace("random.uniform(0, 0.01)", "60"), tmp_path, name, 60.0)
    wait_for(lambda: who_has(tmp_path, side) == [name])  # type: ignore[arg-type]
    holder.send_signal(signal.SIGSTOP)
    engine, learner = EngineTurn(tmp_path, "mine"), LearnerTurn(tmp_path, 1, 0.2)
    if side == "learner":
        assert not engine.try_take()
        holder.kill()
        wait_for(engine.try_take)
    else:
        with pytest.raises(TurnError, match=r"worker-0 did not give up the device within 0\.2 s"):
            learner.take()
        assert who_has(tmp_path, "learner") == [], "whoever gave up waiting wants nothing any more"
        holder.kill()
        wait_for(lambda: not who_has(tmp_path, "engines"))
        learner.take()
        assert learner.is_mine
    engine.close()
    learner.close()


def test_engines_go_on_together_and_the_learner_goes_first(tmp_path: Path) -> None:
    first, second = EngineTurn(tmp_path, "worker-0"), EngineTurn(tmp_path, "worker-1")
    learner = Flag(tmp_path, "learner", "0")
    assert (first.try_take(), second.try_take(), explain(tmp_path)) == (True, True, "")
    learner.hoist(1.0)
    assert first.is_wanted and second.is_wanted
    assert explain(tmp_path) == "the learner wants the device, and worker-0, worker-1 did not give it up"
    first.give()
    assert not first.try_take(), "it would overtake the learner"
    second.give()
    assert explain(tmp_path) == "the learner has the device"
    learner.lower()
    assert explain(tmp_path) == ""
    assert second.try_take()
    for flag in (first, second, learner):
        flag.close()


def test_a_wish_that_comes_while_an_engines_flag_goes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, learner = EngineTurn(tmp_path, "worker-0"), Flag(tmp_path, "learner", "0")
    hoist = engine._flag.try_hoist

    def slow_hoist() -> bool:
        learner.hoist(1.0)
        return hoist()

    monkeypatch.setattr(engine._flag, "try_hoist", slow_hoist)
    assert not engine.try_take()
    assert explain(tmp_path) == "the learner has the device"
    engine.close()
    learner.close()


def test_a_name_has_one_flag(tmp_path: Path) -> None:
    """A worker that is started again waits for what is left of the one before."""
    before, after = Flag(tmp_path, "engines", "worker-0"), Flag(tmp_path, "engines", "worker-0")
    before.hoist(1.0)
    with pytest.raises(TurnError, match=r"another process has held .*engines/worker-0 for 0\.1 s"):
        after.hoist(0.1)
    before.close()
    after.hoist(1.0)
    after.close()


def test_looking_at_a_run_without_turns_makes_nothing(tmp_path: Path) -> None:
    assert explain(tmp_path / "turns") == ""
    assert os.listdir(tmp_path) == []
