import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from databus.process import die_with_parent, spawned_die_with_parent

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = "import time; from databus.process import die_with_parent; die_with_parent(); time.sleep(60)"


def test_child_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)  # time to ask the kernel
    assert _ends_with(parent, child)


SPAWNING = """
import multiprocessing, sys, time
from databus.process import spawned_die_with_parent

def later():
    time.sleep(60)

if __name__ == "__main__":
    with spawned_die_with_parent():
        child = multiprocessing.get_context("spawn").Process(target=later)
        child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_spawned_child_dies_with_its_parent_whatever_it_is_at(after_s: float, tmp_path: Path) -> None:
    """At first it imports; then it runs a target that knows nothing of it."""
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(after_s)
    assert _ends_with(parent, child)


def test_what_is_spawned_afterwards_is_as_ever() -> None:
    original = multiprocessing.spawn.get_command_line
    with pytest.raises(OSError, match="in between"), spawned_die_with_parent():
        assert multiprocessing.spawn.get_command_line is not original
        raise OSError("in between")
    assert multiprocessing.spawn.get_command_line is original


def _ends_with(parent: subprocess.Popen[str], child: int) -> bool:
    """Kills the parent. Nothing here waits for the child, which would be to wait for its own end."""
    assert parent.stdout is not None and _runs(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = _runs(child)
    if alive:
        os.kill(child, signal.SIGKILL)
    return not alive


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("main_pid", "ends"), [("1", False), ("77", True), (None, True)])
def test_process_one_is_a_parent_only_where_the_command_is(
    main_pid: str | None, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr("os.getppid", lambda: 1)
    monkeypatch.setattr("os._exit", exits.append)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: type("C", (), {"prctl": staticmethod(lambda *_: 0)}))
    if main_pid is None:
        monkeypatch.delenv("ECHELON_PID", raising=False)
    else:
        monkeypatch.setenv("ECHELON_PID", main_pid)
    die_with_parent()
    assert bool(exits) == ends


ADOPTED = """
import ctypes, os, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, and not to init
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]], check=True)
_, status = os.wait()
sys.exit(os.waitstatus_to_exitcode(status))
"""
LEAVES_A_CHILD = """
import os, subprocess, sys
told = {"ECHELON_PARENT": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | told)
"""
ASKS_TOO_LATE = """
import os, sys, time
from databus.process import die_with_parent
while os.getppid() == int(os.environ["ECHELON_PARENT"]):
    time.sleep(0.01)
die_with_parent()
time.sleep(20)
sys.exit(77)
"""


def test_whoever_asks_too_late_ends_wherever_orphans_go() -> None:
    """A role whose parent is killed while it still imports what it needs."""
    command = [sys.executable, "-c", ADOPTED, LEAVES_A_CHILD, ASKS_TOO_LATE]
    assert subprocess.run(command, timeout=30).returncode == 1


def test_the_next_child_is_not_told_of_its_grandparent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: type("C", (), {"prctl": staticmethod(lambda *_: 0)}))
    monkeypatch.setenv("ECHELON_PARENT", str(os.getppid()))
    die_with_parent()
    assert "ECHELON_PARENT" not in os.environ


PROGRAM = """
import atexit, sys, threading, time
from databus.process import run_as_program

class Left:
    def __del__(self):
        print("taken apart")

left = Left()
left.itself = left

def later():
    time.sleep(0.2)
    print("thread")

def main():
    atexit.register(print, "exit handler")
    threading.Thread(target=later).start()
    {end}

run_as_program(main)
"""


@pytest.mark.parametrize(("end", "code"), [("return 3", 3), ("sys.exit(143)", 143), ("raise KeyError('x')", 1)])
def test_program_ends_whole_but_is_not_taken_apart(end: str, code: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{end}", end)], capture_output=True, text=True, timeout=20, check=False
    )
    assert ran.returncode == code
    is_raised = "KeyError" in ran.stderr
    assert ran.stdout.split("\n")[:2] == ["thread", "exit handler"]
    assert is_raised == (code == 1)
    assert ("taken apart" in ran.stdout) == is_raised  # nobody knows what that left behind
