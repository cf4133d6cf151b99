"""The sandbox on this machine's kernel: what it runs, and what gets out of it."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hostile import Snippet, snippets

from rewards.config import SandboxConfig
from rewards.errors import SandboxError
from rewards.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"memory_bytes": 128 << 20, "processes": 6, "files_bytes": 4 << 20, "output_bytes": 64 << 10}
LATE_S = 0.25
FAIR_S = 20.0
TESTS = ("assert add(2, 3) == 5", "assert add(-1, 1) == 0")


@pytest.fixture(scope="module", params=["namespaces", "rlimits"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    sandbox = Sandbox(SandboxConfig(kind=request.param, **SMALL))
    sandbox.start()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def walled() -> Iterator[Sandbox]:
    sandbox = Sandbox(SandboxConfig(kind="namespaces", **SMALL))
    sandbox.start()
    yield sandbox
    sandbox.close()


def keeper(sandbox: Sandbox) -> psutil.Process:
    sandbox.start()
    assert sandbox._process is not None
    return psutil.Process(sandbox._process.pid)


# ------------------------------------------------------------ what it is for


def test_runs_a_program(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import sys\nprint(int(input()) + 1)\nprint('é', file=sys.stderr)\nsys.exit(3)", "41\n")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (3, b"42\n", "é\n".encode())
    assert not outcome.late and 0 < outcome.wall_s < FAIR_S


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("", 0), ("raise KeyError(1)", 1), ("import os; os.abort()", -6), ("import os; os._exit(33)", 33), ("def f(:", 1)],
)
def test_exit_codes_are_those_of_python(sandbox: Sandbox, code: str, exit_code: int) -> None:
    outcome = sandbox.run(code)
    assert outcome.exit_code == exit_code
    assert (b"KeyError" in outcome.stderr) == ("KeyError" in code)


def test_a_program_is_the_main_module(sandbox: Sandbox) -> None:
    code = """
import threading
def later(): print("later")
if __name__ == "__main__": threading.Thread(target=later).start()
"""
    assert sandbox.run(code).stdout == b"later\n"


@pytest.mark.parametrize(
    ("solution", "tests", "passed"),
    [
        ("def add(a, b): return a + b", TESTS, 2),
        ("def add(a, b): return a - b", TESTS, 0),
        ("def add(a, b): return 5", TESTS, 1),
        ("def sort(x): x.sort()", ["x = [3, 1]; sort(x); assert x == [1, 3]"], 1),
        ("def f(x): return {'a': (1, 2.5), 3: {x}}", ["assert f(b'z') == {'a': (1, 2.5), 3: {b'z'}}"], 1),
        ("class A:\n    n = 1\n    def up(self): self.n += 1; return self", ["assert A().up().up().n == 3"], 1),
        (
            "def f(x): raise ValueError('no')",
            ["try: f(1)\nexcept ValueError as e: assert str(e) == 'ValueError: no'"],
            1,
        ),
        ("import math\nf = math.sqrt", ["assert math.isclose(f(2) ** 2, 2)"], 1),
        ("def f(): return float('inf')", ["assert f() == float('inf')"], 1),
        ("", ["assert missing(1) == 1"], 0),
        ("def f(:", ["assert f(1) == 1"], 0),
    ],
)
def test_assertions(sandbox: Sandbox, solution: str, tests: list[str], passed: int) -> None:
    verdict = sandbox.check(solution, tests, stop=False)
    assert (verdict.passed, verdict.total, verdict.fault) == (passed, len(tests), "")
    assert bool(verdict.error) == (passed < len(tests))


@pytest.mark.parametrize(
    ("tests", "setup", "fault"),
    [
        (["assert add(1"], "", "SyntaxError"),
        (["assert add(1, 2) == 3"], "import no_such_module", "setup: ModuleNotFoundError"),
        (["assert add(lambda: 1, 2) == 3"], "", "gives the solution a function"),
    ],
)
def test_tests_that_cannot_run_are_not_the_solutions_fault(
    sandbox: Sandbox, tests: list[str], setup: str, fault: str
) -> None:
    assert fault in sandbox.check("def add(a, b): return a + b", tests, setup).fault


def test_a_late_program_is_killed(sandbox: Sandbox) -> None:
    started = time.monotonic()
    outcome = sandbox.run("print('x', flush=True)\nwhile True: pass", limit_s=LATE_S)
    assert outcome.late and outcome.exit_code == -9 and outcome.stdout == b"x\n"
    assert time.monotonic() - started < FAIR_S / 2
    assert sandbox.check("while True: pass", TESTS, limit_s=LATE_S).error == f"took longer than {LATE_S:g} s"
    assert sandbox.run("print(1)").stdout == b"1\n"


def test_a_keeper_that_died_is_replaced(walled: Sandbox) -> None:
    keeper(walled).kill()
    with pytest.raises(SandboxError, match="keeper"):
        walled.run("print(1)")
    assert walled.run("print(1)").stdout == b"1\n"


def test_a_killed_keeper_takes_its_snippets_along(walled: Sandbox) -> None:
    def run() -> None:
        with pytest.raises(SandboxError):
            walled.run("while True: pass")

    running = threading.Thread(target=run)
    running.start()
    below: list[psutil.Process] = []
    while len(below) < 3:
        below = keeper(walled).children(recursive=True)
    keeper(walled).kill()
    running.join(FAIR_S)
    assert not psutil.wait_procs(below, timeout=FAIR_S)[1]


ORPHAN_SCRIPT = """
from rewards.config import SandboxConfig
from rewards.sandbox import Sandbox

sandbox = Sandbox(SandboxConfig(kind="namespaces"))
sandbox.start()
print("ready", flush=True)
sandbox.run("while True: pass", limit_s=600)
"""


def test_no_process_outlives_a_killed_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", ORPHAN_SCRIPT], stdout=subprocess.PIPE, cwd=ROOT)
    with owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        below: list[psutil.Process] = []
        while len(below) < 4:  # keeper, launcher, first process, snippet
            below = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    assert not psutil.wait_procs(below, timeout=FAIR_S)[1]


def test_a_kind_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"reward.sandbox.kind=bubblewrap: bubblewrap: bwrap is not installed"):
        Sandbox(SandboxConfig(kind="bubblewrap")).start()


def test_without_namespaces_it_says_so_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = Sandbox._start

    def no_namespaces(self: Sandbox, kind: str) -> None:
        if kind != "rlimits":
            raise SandboxError("unshare: Operation not permitted")
        start(self, kind)

    monkeypatch.setattr(Sandbox, "_start", no_namespaces)
    sandbox = Sandbox(SandboxConfig())
    sandbox.start()
    sandbox.close()
    assert sandbox.kind == "rlimits"
    assert [record.message[:8] for record in caplog.records] == ["SANDBOX:"]
    assert "namespaces: unshare: Operation not permitted" in caplog.text


# ------------------------------------------------------------ what means harm


def wrong(sandbox: Sandbox, snippet: Snippet) -> str:
    """What came of it, where that is not what must."""
    if snippet.expect == "fails":
        verdict = sandbox.check(snippet.code, TESTS, limit_s=FAIR_S)
        return "" if verdict.passed == 0 and not verdict.fault else f"{verdict}"
    outcome = sandbox.run(snippet.code, limit_s=LATE_S if snippet.expect == "late" else FAIR_S)
    bounded = max(len(outcome.stdout), len(outcome.stderr)) <= SMALL["output_bytes"]
    holds = {
        "safe": outcome.stdout == b"safe\n" and not outcome.late,
        "ends": not outcome.late and b"escaped" not in outcome.stdout,
        "late": outcome.late,
    }
    return "" if bounded and holds[snippet.expect] else f"{outcome}"


@pytest.mark.timeout(600)
def test_a_thousand_hostile_snippets(tmp_path: Path) -> None:
    """No escape, no process or file or descriptor left, every verdict right, the same keepers at the end."""
    secret, journal = tmp_path / "secret", tmp_path / "journal"
    secret.write_text("secret")
    journal.mkdir()
    (journal / "000001.seg").write_text("segment")
    given = snippets(secret, journal, os.getpid())
    assert len({(snippet.code, snippet.expect) for snippet in given}) >= 1000
    sandboxes = [Sandbox(SandboxConfig(kind="namespaces", **SMALL)) for _ in range(2)]
    halves = given[: len(given) // 2], given[len(given) // 2 :]
    before = state(sandboxes, tmp_path)
    with ThreadPoolExecutor(2) as threads:
        results = threads.map(lambda sandbox, half: [(each, wrong(sandbox, each)) for each in half], sandboxes, halves)
        failed = [(snippet, why) for half in results for snippet, why in half if why]
    assert not failed, (len(failed), Counter(snippet.family for snippet, _ in failed), failed[:5])
    assert state(sandboxes, tmp_path) == before
    for sandbox in sandboxes:
        assert sandbox.check("def add(a, b): return a + b", TESTS).passed == 2
        sandbox.close()


def state(sandboxes: list[Sandbox], folder: Path) -> list[object]:
    """Keepers, processes below them, open files of all, and what lies on the disk."""
    processes = [keeper(sandbox) for sandbox in sandboxes]
    below = [(process.pid, process.children(recursive=True), process.num_fds()) for process in processes]
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [*below, len(os.listdir("/proc/self/fd")), files]


def test_a_sandbox_that_lets_things_through_is_noticed(walled: Sandbox) -> None:
    """`wrong` can tell: the verdicts above are not right for want of looking."""
    assert wrong(walled, Snippet("", "print('escaped')"))
    assert wrong(walled, Snippet("", "def add(a, b): return a + b", "fails"))
