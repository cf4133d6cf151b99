"""Child processes of the supervisor: each in a session of its own, with a log, and gone when asked."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from databus.process import PARENT_VARIABLE
from echelon.launch.base import RunningRole

NO_LOG = Path(os.devnull)
POLL_S = 0.05
REPORT_BYTES = 4096
LINE_LENGTH = 300
BETWEEN_S = 0.1


@dataclass(frozen=True)
class RoleProcess:
    """A role's process as the kernel sees it. state: of psutil, such as `sleeping` and `stopped`."""

    role: str
    pid: int
    state: str
    cpu_s: float
    memory_bytes: int


class Child:
    """One role's process. A session of its own keeps the terminal's Ctrl-C from it: the supervisor decides."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Start `python -m ARGUMENTS`, appending its output to `log`; None: it has this process's.

        Args: stop_signal: tells it that the run ends.

        Call it from the main thread: children ask the kernel to die with the thread that started them.
        """
        self.name = name
        self._stop_signal = stop_signal
        self.log = log or NO_LOG
        self.started = time.monotonic()
        self.exited_at: float | None = None
        with self.log.open("ab") as output:
            self._log_start = 0 if log is None else output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=dict(environment) | {PARENT_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=None if log is None else output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        code = self._process.poll()
        if code is not None and self.exited_at is None:
            self.exited_at = time.time()
        return code

    def killed_by(self) -> int | None:
        """The signal that ended it, or one of torchrun's ranks; None where none did."""
        code = self.exit_code() or 0
        if code <= 0:
            return -code or None
        return _signal_of_a_rank(self._last_words())

    def how_it_ended(self) -> str:
        """`was killed by SIGKILL`: the signal that ended it, or one of torchrun's ranks, else the exit code."""
        code = self.exit_code() or 0
        killed_by = self.killed_by()
        if killed_by:
            hint = " (out of memory, perhaps)" if killed_by == signal.SIGKILL else ""
            return f"was killed by {_signal_name(killed_by)}{hint}"
        words = f"ended with exit code {code}"
        return f"{words}: {last_line}" if code and (last_line := _last_line(self._last_words())) else words

    def _last_words(self) -> str:
        """The end of its log, without what another of its name had written before."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self._log_start, self.log.stat().st_size - REPORT_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def terminate(self) -> None:
        """Ask it to leave; it tells its own children."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, self._stop_signal)

    def kill(self) -> None:
        """End it and all of its process group, however busy."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def waits_for(self) -> str:
        return ""

    def look(self, module: str) -> list[RoleProcess]:
        """The processes that run `python -m module`: its own, or torchrun's ranks below it, without the agent."""
        seen = [_look_at(self.name, each) for each in self._family() if _runs(each, module)]
        return [process for process in seen if process is not None]

    def ask_for_stacks(self, module: str) -> None:
        """SIGUSR1 to whoever answers it with its stacks; a process that does not expect it would end of it."""
        family = self._family()
        asked = [each.pid for each in family if _runs(each, module)]
        asked += [each.pid for each in family if _is_spawned(each) and _catches(each.pid, signal.SIGUSR1)]
        for pid in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
            time.sleep(BETWEEN_S)  # a worker and its scoring processes write to one log

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        return []


def stop_all(children: Iterable[RunningRole], grace_s: float) -> None:
    """Their stop signals, then SIGKILL to the process group of whoever still runs after `grace_s`; reaps them all."""
    running = [child for child in children if child.exit_code() is None]
    for child in running:
        child.terminate()
    wait_all(running, grace_s)
    for child in running:
        child.kill()  # also when it has gone: one of its own may be left in the group
    wait_all(running, grace_s)


def wait_all(children: Iterable[RunningRole], timeout_s: float) -> bool:
    """Have all ended, within the time?"""
    waiting = list(children)
    deadline = time.monotonic() + timeout_s
    while any(child.exit_code() is None for child in waiting):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def child_environment(root: Path, defaults: Mapping[str, str]) -> dict[str, str]:
    """This environment, with our packages found in `root` and nowhere else. What the user has set beats `defaults`."""
    environment = dict(defaults) | dict(os.environ)
    search = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _look_at(role: str, process: psutil.Process) -> RoleProcess | None:
    """None where it has just ended."""
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return RoleProcess(role, process.pid, process.status(), times.user + times.system, process.memory_info().rss)
    return None


def _runs(process: psutil.Process, module: str) -> bool:
    """Only `python … -m module …`: torchrun's agent names the module, too, but runs another."""
    words = _words(process)
    return "-m" in words and words[words.index("-m") + 1 :][:1] == [module]


def _is_spawned(process: psutil.Process) -> bool:
    """By Python's multiprocessing, and still what it was spawned as: vLLM's processes take other names."""
    return any("spawn_main" in word for word in _words(process))


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _catches(pid: int, number: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _signal_of_a_rank(log: str) -> int | None:
    """torchrun's agent survives its ranks and exits with 1; its report says `exitcode  : -9 (pid: 123)`."""
    found = re.findall(r"exitcode\s*:\s*-(\d+)", log)
    return int(found[0]) if found else None


def _last_line(log: str) -> str:
    """What it said last: of a traceback, the error."""
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")[:LINE_LENGTH]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
