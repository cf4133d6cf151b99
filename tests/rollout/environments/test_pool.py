"""Processes that hold an environment: what it does wrong costs one answer."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewards.config import RewardConfig
from rewards.errors import RewardError
from rollout.config import EnvironmentConfig
from rollout.environments import pool as pools
from rollout.environments.base import Step
from rollout.environments.pool import EnvironmentPool
from rollout.environments.resolve import load_class

SOURCE = """
import os, time
from rollout.environments.base import Step

class Count:
    def __init__(self, by=1):
        self.by = by

class Guess:
    def reset(self, problem):
        if problem.get("bad"):
            raise KeyError("answer")
        return Count(problem["by"])  # a class of this file: nobody else could unpickle it

    def step(self, state, turn):
        match turn:
            case "raise": raise ZeroDivisionError("no\\nsuch")
            case "exit": raise SystemExit(3)
            case "hang": time.sleep(100)
            case "die": os._exit(7)
            case "text": return "text"
            case "nan": return Step(parts={"a": float("nan")})
            case "output": return Step(output=3)
            case "unpicklable": return Step(state=lambda: 1)
        return Step(output=f"{state.by}", state=Count(state.by + 1), parts={"a": 1}, done=turn == "end")

class NoStep:
    def reset(self, problem): ...

class Broken:
    def __init__(self): raise OSError("no table")
    def reset(self, problem): ...
    def step(self, state, turn): ...

def function(): ...
"""
CONFIG = EnvironmentConfig(name="guess.py:Guess", step_s=1.0, processes=2)


class Opened:
    def __init__(self, folder: Path, name: str = CONFIG.name) -> None:
        config = EnvironmentConfig(name=name, step_s=CONFIG.step_s, processes=CONFIG.processes)
        self.runner = asyncio.Runner()
        self.pool = EnvironmentPool(config, RewardConfig(), folder)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(asyncio.wait_for(coroutine, 60))

    def close(self) -> None:
        self.run(self.pool.close())
        self.runner.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    (folder / "guess.py").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Opened]:
    opened = Opened(folder)
    opened.run(opened.pool.start())
    yield opened
    opened.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "SPARE_S", 0.5)


def test_a_state_lives_from_step_to_step_in_any_process(opened: Opened) -> None:
    async def scenario() -> list[Step]:
        states = await asyncio.gather(*(opened.pool.reset({"by": by}) for by in (1, 10)))
        firsts = await asyncio.gather(*(opened.pool.step(state, "") for state in states))
        return await asyncio.gather(*(opened.pool.step(first.state, "end") for first in firsts))

    steps = opened.run(scenario())
    assert [step.output for step in steps] == ["2", "11"]
    assert all(step.done and step.parts == {"a": 1.0} for step in steps)


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ("raise", "error: ZeroDivisionError: no such"),
        ("exit", "error: SystemExit: 3"),
        ("hang", "error: the tool took longer than 1 s and was killed"),
        ("die", "error: the tool ended its process (exit code 7)"),
    ],
)
def test_a_tool_that_fails_is_told_counted_and_forgotten(opened: Opened, patient: None, turn: str, told: str) -> None:
    async def scenario() -> tuple[Step, Step, float]:
        state = await opened.pool.reset({"by": 5})
        started = time.monotonic()
        wrong = await opened.pool.step(state, turn)
        return wrong, await opened.pool.step(wrong.state, ""), time.monotonic() - started

    wrong, after, took_s = opened.run(scenario())
    assert (wrong.output, wrong.tool_calls, wrong.tool_errors, wrong.done) == (told, 1, 1, False)
    assert after.output == "5", "the state is what it was"
    assert took_s < 30


def test_one_that_hangs_holds_nobody_else_up(opened: Opened, patient: None) -> None:
    async def scenario() -> list[str]:
        state = await opened.pool.reset({"by": 5})
        ended: list[str] = []

        async def step(turn: str) -> None:
            await opened.pool.step(state, turn)
            ended.append(turn)

        await asyncio.gather(step("hang"), *(step(str(number)) for number in range(10)))
        return ended

    assert opened.run(scenario())[-1] == "hang"


@pytest.mark.parametrize("turn", ["text", "nan", "output", "unpicklable"])
def test_what_is_no_step_fails_the_group(opened: Opened, turn: str) -> None:
    async def scenario() -> None:
        await opened.pool.step(await opened.pool.reset({"by": 5}), turn)

    with pytest.raises(RewardError, match=r"environment 'guess.py:Guess' failed: ") as caught:
        opened.run(scenario())
    assert "\n" not in str(caught.value)


def test_a_problem_that_cannot_be_begun_fails_the_group(opened: Opened) -> None:
    with pytest.raises(RewardError, match=r"'guess.py:Guess' failed at reset: KeyError: 'answer' .*guess.py"):
        opened.run(opened.pool.reset({"bad": True}))


def test_an_environment_that_cannot_be_made_says_so_at_start(folder: Path) -> None:
    opened = Opened(folder, "guess.py:Broken")
    with pytest.raises(ValueError, match=r"rollout.environment.name='guess.py:Broken': OSError: no table"):
        opened.run(opened.pool.start())
    opened.close()
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("search", "'search': expected calculator, python or PATH.py:CLASS"),
        ("gone.py:Guess", "no such file"),
        ("guess.py:Gone", "has no function 'Gone'"),
        ("guess.py:NoStep", "is no environment: expected a class with reset and step"),
        ("guess.py:function", "is no environment: expected a class with reset and step"),
    ],
)
def test_a_name_that_there_is_not(folder: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_class(name, folder)
    assert said in str(caught.value) and str(caught.value).startswith("rollout.environment.name=")


def test_the_guides_example(tmp_path: Path) -> None:
    guide = (Path(__file__).resolve().parents[3] / "docs" / "guide" / "write-an-environment.md").read_text()
    (tmp_path / "games.py").write_text(guide.split("```python\n")[1].split("```")[0])
    game = load_class("games.py:HigherOrLower", tmp_path)()
    first = game.step(game.reset({"number": 7}), "3")
    second = game.step(first.state, " 9\n")
    assert (first.output, second.output, second.done) == ("higher", "lower", False)
    assert game.step(second.state, "7") == Step(done=True, parts={"found": 1 / 3})
