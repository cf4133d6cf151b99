import os
import signal
import sys
import time
from pathlib import Path

import pytest

from echelon.errors import ErrorReport, write_error
from echelon.failures import first_cause
from echelon.packages import package_root
from echelon.processes import Child, child_environment, stop_all, wait_all

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(grandchild.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def start(folder: Path, name: str, code: str) -> Child:
    """`python -m NAME` with `code` as that module."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    environment = child_environment(folder, {})
    return Child(name, [module], environment, folder / "logs" / f"{name}.log")


def wait_for_text(file: Path, text: str = "\n") -> str:
    deadline = time.monotonic() + 10
    while text not in file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_goes_to_the_log(folder: Path) -> None:
    child = start(folder, "worker-0", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert wait_all([child], 10)
    assert child.how_it_ended() in ("ended with exit code 3: out", "ended with exit code 3: err")
    assert sorted(child.log.read_text().split()) == ["err", "out"]


def test_whoever_ignores_sigterm_is_killed_with_its_children(folder: Path) -> None:
    child = start(folder, "worker-0", STUBBORN)
    grandchild = int(wait_for_text(child.log))
    stop_all([child], 0.3)
    assert child.exit_code() == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(grandchild)


def test_a_signal_is_named(folder: Path) -> None:
    child = start(folder, "worker-0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert wait_all([child], 10)
    assert child.how_it_ended() == "was killed by SIGSEGV"
    failure = first_cause([child], folder / "logs")
    assert str(failure) == f"worker-0 was killed by SIGSEGV (log: {child.log})"
    assert failure.exit_code == 1


def test_the_signal_of_a_torchrun_rank_is_named(folder: Path) -> None:
    report = "  rank      : 0 (local_rank: 0)\n  exitcode  : -9 (pid: 123)\n"
    child = start(folder, "learner", f"import sys; print({report!r}); sys.exit(1)")
    assert wait_all([child], 10)
    assert child.killed_by() == signal.SIGKILL
    assert child.how_it_ended() == "was killed by SIGKILL (out of memory, perhaps)"


def test_what_an_earlier_one_had_written_is_not_how_this_one_ended(folder: Path) -> None:
    (folder / "logs" / "learner.log").write_text("  exitcode  : -9 (pid: 123)\n")
    child = start(folder, "learner", "import sys; print('out of paper'); sys.exit(1)")
    assert wait_all([child], 10)
    assert child.killed_by() is None
    assert child.how_it_ended() == "ended with exit code 1: out of paper"


def report(folder: Path, role: str, kind: str, when: float, message: str) -> None:
    file = folder / "logs" / f"{role}.error.json"
    write_error(file, ErrorReport(time=when, role=role, kind=kind, message=message))  # type: ignore[arg-type]


def test_the_first_cause_is_the_earliest_that_is_no_consequence(folder: Path) -> None:
    report(folder, "worker-0", "consequence", 1.0, "lost the broker")
    report(folder, "broker", "runtime", 2.0, "disk full")
    report(folder, "learner-rank1", "runtime", 3.0, "later")
    failure = first_cause([], folder / "logs")
    assert str(failure) == f"broker: disk full (log: {folder / 'logs' / 'broker.log'})"


def test_bad_input_is_told_as_it_is(folder: Path) -> None:
    report(folder, "prepare", "user", 1.0, "data.train=x has no rows")
    failure = first_cause([], folder / "logs")
    assert (str(failure), failure.exit_code) == ("data.train=x has no rows", 2)


def test_a_killed_process_comes_before_its_consequences(folder: Path) -> None:
    child = start(folder, "broker", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    report(folder, "worker-0", "consequence", 1.0, "lost the broker")
    assert wait_all([child], 10)
    assert str(first_cause([child], folder / "logs")).startswith("broker was killed by SIGKILL")


def test_environment_finds_our_packages_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    environment = child_environment(tmp_path, {"OMP_NUM_THREADS": "1"})
    assert environment["PYTHONPATH"] == f"{tmp_path}{os.pathsep}/elsewhere"
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["OMP_NUM_THREADS"] == "4"


def test_packages_come_from_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (package_root() / "echelon" / "packages.py").is_file()
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    with pytest.raises(ValueError, match=f"package 'rewards' comes from {tmp_path}"):
        package_root()
