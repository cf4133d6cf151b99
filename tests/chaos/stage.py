"""A run folder, the processes of its roles, and someone who starts again what has died: the stage for faults."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stand_ins import PEER_ADDRESS, TRAINED_FILE, Faults

from echelon.config import RunConfig
from echelon.files import read_rows
from echelon.prompt_files import encode_prompt, write_prompts
from echelon.recipe import Recipe
from echelon.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WATCH_S = 0.05
NUM_PROMPTS = 50
CRASHED = -signal.SIGKILL


class Role:
    """One role's process, started again whenever it dies. environment: asked for at each start."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, environment: Callable[[], dict[str, str]]
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._log = log
        self._environment = environment
        self.starts = 0
        self.stopped_until = 0.0
        self.start()

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-P", str(HERE / "stand_ins.py"), *self._arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self._environment()
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT
            )

    def exit_code(self) -> int | None:
        return self.process.poll()

    def signal(self, number: int) -> None:
        if self.exit_code() is None:
            self.process.send_signal(number)

    def log_tail(self) -> str:
        return f"--- {self.name}\n{self._log.read_text(errors='replace')[-4000:]}"


class Stage:
    """Broker, learner and workers of one run, as stand-ins. Everything drawn comes from `seed`."""

    def __init__(self, folder: RunFolder, workers: int, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.faults = Faults(folder.path)
        self.faults.folder.mkdir()
        self.injected: Counter[str] = Counter()
        self.crash_points: Callable[[], str] | None = None
        self.peer_address = ""
        """Where peers find the broker, if not where it says: a proxy."""
        self._workers = workers
        self.roles: dict[str, Role] = {}

    def start(self) -> None:
        self._start("broker", ["broker", str(self.folder.path)], self._broker_environment)
        deadline = time.monotonic() + 30.0
        while self.folder.bus() is None:
            self.keep()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(WATCH_S)
        self._start("learner", ["learner", str(self.folder.path)], self._peer_environment)
        for index in range(self._workers):
            name = f"worker-{index}"
            self._start(name, ["worker", str(self.folder.path), "--name", name], self._peer_environment)

    def _start(self, name: str, arguments: list[str], environment: Callable[[], dict[str, str]]) -> None:
        self.roles[name] = Role(name, arguments, self.folder.log_file(name), environment)

    def _broker_environment(self) -> dict[str, str]:
        if self.crash_points is None:
            return {}
        return {"ECHELON_CRASH_AT": self.crash_points()}

    def _peer_environment(self) -> dict[str, str]:
        return {PEER_ADDRESS: self.peer_address} if self.peer_address else {}

    # ------------------------------------------------------------ watching

    def keep(self) -> None:
        """Start again what has died; let go on what was stopped for long enough."""
        for role in self.roles.values():
            code = role.exit_code()
            if code == 0:
                continue
            if code is not None:
                if code == CRASHED and role.name == "broker" and self.crash_points is not None:
                    self.injected["crash point or kill of broker"] += 1
                role.stopped_until = 0.0
                role.start()
            elif role.stopped_until and time.monotonic() >= role.stopped_until:
                role.stopped_until = 0.0
                role.signal(signal.SIGCONT)

    def play(self, for_s: float) -> None:
        """Let it run for a while."""
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline and not self.has_ended():
            self.keep()
            time.sleep(WATCH_S)

    def has_ended(self) -> bool:
        return all(self.roles[name].exit_code() == 0 for name in ("broker", "learner"))

    def finish(self, within_s: float) -> None:
        """No more faults: the run must end well."""
        self.crash_points = None
        self.faults.hold.unlink(missing_ok=True)
        deadline = time.monotonic() + within_s
        while not self.has_ended():
            assert time.monotonic() < deadline, f"the run did not end within {within_s} s\n{self.logs()}"
            self.keep()
            time.sleep(WATCH_S)

    def steps_done(self) -> int:
        return len(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder.metrics_file)

    def trained(self) -> list[tuple[int, str, str]]:
        """What the learner's lives have trained: (step, hash of the batch, hash of the state)."""
        file = self.folder.path / TRAINED_FILE
        lines = file.read_text().splitlines() if file.exists() else []
        fields = [line.split() for line in lines]
        return [(int(step), digest, state) for step, digest, state in fields]

    def logs(self) -> str:
        return "\n".join(role.log_tail() for role in self.roles.values())

    # ------------------------------------------------------------ faults

    def kill(self, name: str) -> None:
        self.injected[f"kill {name.partition('-')[0]}"] += 1
        self.roles[name].signal(signal.SIGKILL)

    def stop(self, name: str, for_s: float) -> None:
        """SIGSTOP now, SIGCONT later."""
        self.injected[f"stop {name.partition('-')[0]}"] += 1
        self.roles[name].stopped_until = time.monotonic() + for_s
        self.roles[name].signal(signal.SIGSTOP)

    def fill_disk(self, for_s: float) -> None:
        self.injected["disk full"] += 1
        self.faults.disk_full.touch()
        self.play(for_s)
        self.faults.disk_full.unlink()

    def jump_clock(self, by_s: float) -> None:
        self.injected["clock jump"] += 1
        self.faults.clock.write_text(str(by_s))

    def close(self) -> None:
        for role in self.roles.values():
            role.signal(signal.SIGCONT)
            role.signal(signal.SIGKILL)
            role.process.wait()


@contextmanager
def stage(config: RunConfig, seed: int, workers: int = 2) -> Iterator[Stage]:
    """A stage in a folder of its own, whose path is short enough for a socket; gone afterwards.

    Whoever leaves it in good order has the run audited.
    """
    path = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        folder = RunFolder(path / "run")
        folder.path.mkdir()
        recipe = path / "chaos.py"
        recipe.write_text("# written by a test\n")
        with folder.locked():
            folder.claim(Recipe(path=recipe, config=config), resume=False)
            rows = [(f"{n}=", [4, 5 + n % 20, n]) for n in range(NUM_PROMPTS)]
            write_prompts(folder.train_prompts, [encode_prompt(text, ids, {"prompt": text}) for text, ids in rows])
            scene = Stage(folder, workers, seed)
            try:
                yield scene
            finally:
                scene.close()
        audit(folder)
    finally:
        shutil.rmtree(path)


def audit(folder: RunFolder) -> None:
    """Fails with what `echelon audit` says where it finds anything."""
    command = [sys.executable, "-m", "echelon", "audit", str(folder.path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
