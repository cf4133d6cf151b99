"""Whole runs in processes of their own, with the small engine on the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from databus.messages import Status, WorkerStatus
from echelon.observer import Observer
from echelon.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240

RECIPE = """
from echelon.config import DataConfig, EvalConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig

{reward}

def recipe():
    return RunConfig(
        model={model!r},
        data=DataConfig(train={train!r}, eval={evals!r}),
        reward=RewardConfig(function=f"{{__file__}}:reward"),
        group_size=4,
        batch_groups=4,
        max_staleness=2,
        rollout=RolloutConfig(engine="small", max_sequences=32, context_tokens=64, max_tokens=12),
        learner=LearnerConfig(steps=6, lr=1e-3),
        eval=EvalConfig(every=3),
        wandb=WandbConfig(mode="disabled"),
    )
"""
REWARD = """
def reward(sample):
    return {"ones": float(sample.completion.count("1")), "short": -0.01 * sample.num_tokens}
"""

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def write_recipe(tiny_model: Path) -> WriteRecipe:
    """(folder, reward=source) -> a recipe there, its data beside it."""

    def write(folder: Path, reward: str = REWARD) -> Path:
        train, evals = folder / "train.jsonl", folder / "eval.jsonl"
        train.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(9) for b in range(5)))
        evals.write_text("".join(json.dumps({"prompt": f"{a}+9="}) + "\n" for a in range(8)))
        recipe = folder / "small_recipe.py"
        recipe.write_text(RECIPE.format(reward=reward, model=str(tiny_model), train=str(train), evals=str(evals)))
        return recipe

    return write


class Run:
    """`echelon run` as a process; remembers every process that it ever had below it."""

    def __init__(self, recipe: Path, run_dir: Path, *words: str, python_path: Path | None = None) -> None:
        """Args: python_path: a folder from which every process takes its `sitecustomize`."""
        self.folder = run_dir
        command = [sys.executable, "-m", "echelon", "run", str(recipe), "--run-dir", str(run_dir), *words]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ({"PYTHONPATH": str(python_path)} if python_path else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._family: dict[int, psutil.Process] = {}

    def finish(self, timeout_s: float = TIMEOUT_S) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) once it has ended."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)
        assert self.process.poll() is not None, f"still running after {timeout_s} s\n{self.logs()}"
        stdout, stderr = self.process.communicate()
        return self.process.returncode, stdout, stderr

    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            assert self.process.poll() is None, (self.process.communicate(), self.logs())
            self.look()
            time.sleep(0.1)

    def look(self) -> list[psutil.Process]:
        """Processes below it now."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._family |= {process.pid: process for process in family}
        return family

    def role(self, module: str, *more: str) -> psutil.Process:
        """The process that runs `python -m MODULE ... MORE`."""
        found = self._running(module, *more)
        assert found, f"no process runs {module}"
        return found[0]

    def ranks(self) -> list[psutil.Process]:
        return self._running("echelon.roles.learner")

    def _running(self, module: str, *more: str) -> list[psutil.Process]:
        words = {process: _words(process) for process in self.look()}
        return [
            process
            for process, said in words.items()
            if "-m" in said and said[said.index("-m") + 1] == module and set(more) <= set(said)
        ]

    def status(self) -> Status:
        """What the broker says now."""
        bus = RunFolder(self.folder).bus()
        assert bus is not None
        observer = Observer(bus)
        try:
            deadline = time.monotonic() + 10.0
            while (status := observer.poll()) is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            return status
        finally:
            observer.close()

    def worker(self, name: str) -> WorkerStatus | None:
        """What the broker knows of a worker; None where it does not know it."""
        return next((worker for worker in self.status().workers if worker.name == name), None)

    def survivors(self, within_s: float = 10.0) -> list[str]:
        """Who of its family is still there."""
        deadline = time.monotonic() + within_s
        while (left := [process for process in self._family.values() if _alive(process)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return [" ".join(_words(process)) for process in left]

    def logs(self) -> str:
        files = sorted((self.folder / "logs").glob("*")) if self.folder.exists() else []
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def kill_all(self) -> None:
        self.look()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for process in self._family.values():
            if _alive(process):
                os.kill(process.pid, signal.SIGKILL)


def _words(process: psutil.Process) -> list[str]:
    """Its command line; empty where it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie, too
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def start_run() -> Iterator[Callable[..., Run]]:
    """(recipe, run_dir, *words) -> a `Run`; whatever is left of it at the end is killed."""
    runs: list[Run] = []

    def start(recipe: Path, run_dir: Path, *words: str, **more: Any) -> Run:
        runs.append(Run(recipe, run_dir, *words, **more))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()
