"""What was interrupted and what was not end alike, to the last bit: synchronous runs with the small engine."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
SETTINGS = (
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=4",
    "learner.keep_checkpoints=2",
    "max_staleness=0",
    "eval.every=0",
)
SAME = (
    "loss/policy",
    "learner/grad_norm",
    "reward/mean",
    "rollout/length_mean",
    "mismatch/kl",
    "ledger/trained_groups",
)

Outcome = tuple[list[dict[str, float]], bytes]


def echelon(*words: str | Path) -> None:
    command = [sys.executable, "-m", "echelon", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def outcome(run) -> Outcome:
    """The figures of every step, and the weights after the last; audited."""
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(STEPS))
    echelon("audit", run.folder)
    exported = run.folder.parent / "exported"
    echelon("export", run.folder, exported)
    return [{name: row[name] for name in SAME} for row in rows], (exported / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def recipe(write_recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, start_run, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    rows, weights = outcome(start_run(recipe, tmp_path_factory.mktemp("undisturbed") / "run", *SETTINGS))
    assert len({row["loss/policy"] for row in rows}) > 1 < len({row["learner/grad_norm"] for row in rows})
    return rows, weights


@pytest.fixture
def started(recipe: Path, start_run, tmp_path: Path) -> Callable:
    """(steps) -> a run that has taken so many."""

    def start(steps: int):
        run = start_run(recipe, tmp_path / "run", *SETTINGS)
        run.wait_for(lambda: len(run.rows()) >= steps)
        return run

    return start


@pytest.mark.parametrize(
    "steps",
    [pytest.param(2, id="before the first checkpoint", marks=pytest.mark.chaos_long), pytest.param(6, id="after it")],
)
def test_everything_is_killed_and_resumed(undisturbed: Outcome, started, recipe: Path, start_run, steps: int) -> None:
    run = started(steps)
    run.kill_all()
    assert run.survivors() == []
    rows = run.rows()
    resumed = start_run(recipe, run.folder, *SETTINGS, "--resume")
    assert outcome(resumed) == undisturbed
    assert resumed.rows()[: len(rows)] == rows, "what was written stays as it was"


@pytest.mark.parametrize("role", ["broker", "learner", pytest.param("worker", marks=pytest.mark.chaos_long)])
def test_one_role_is_killed(undisturbed: Outcome, started, role: str) -> None:
    run = started(6)
    os.kill(run.role(f"echelon.roles.{role}").pid, signal.SIGKILL)
    assert outcome(run) == undisturbed


SLOW_DISK = """
import os, sys, time

fsync = os.fsync

def wait_and_sync(file):
    while os.path.exists({hold!r}):
        time.sleep(0.05)
    fsync(file)

if "echelon.roles.learner" in sys.orig_argv:
    os.fsync = wait_and_sync
"""


def test_learner_is_killed_while_a_checkpoint_is_written(
    undisturbed: Outcome, recipe: Path, start_run, tmp_path: Path
) -> None:
    """The run is past that checkpoint by then; the learner, having none, takes all steps again, and writes it anew."""
    hold = tmp_path / "hold"
    hold.touch()
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK.format(hold=str(hold)))
    run = start_run(recipe, tmp_path / "run", *SETTINGS, python_path=tmp_path)
    run.wait_for(lambda: len(run.rows()) >= 6)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000004.tmp"]
    os.kill(run.role("echelon.roles.learner").pid, signal.SIGKILL)
    hold.unlink()
    assert outcome(run) == undisturbed


def test_learner_goes_on_from_its_copy_in_memory(undisturbed: Outcome, recipe: Path, start_run, tmp_path: Path) -> None:
    """With no checkpoint but the last; the copies are gone when the run is."""
    copies = ("learner.checkpoint_every=0", "learner.memory_copy_every=1")
    run = start_run(recipe, tmp_path / "run", *SETTINGS, *copies)
    run.wait_for(lambda: len(run.rows()) >= 6)
    learner = run.role("echelon.roles.learner")
    memory = Path(learner.cmdline()[learner.cmdline().index("--memory-copies") + 1])
    run.wait_for(lambda: any(memory.glob("step-00000?")))
    os.kill(learner.pid, signal.SIGKILL)
    assert outcome(run) == undisturbed
    (steps,) = re.findall(r"going on from the copy in memory after (\d+) steps", run.logs())
    assert int(steps) >= 4, "all but the last one or two"
    assert not memory.exists()


def test_a_damaged_checkpoint_ends_the_resumption(undisturbed: Outcome, started, recipe: Path, start_run) -> None:
    """In one line that says what to do; doing it helps."""
    run = started(8)
    run.role("echelon.roles.worker").send_signal(signal.SIGSTOP)  # it must not come to its end meanwhile
    run.wait_for(lambda: (run.folder / "checkpoints" / "step-000008").exists())
    run.kill_all()
    newest = run.folder / "checkpoints" / "step-000008"
    (shard,) = newest.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = {path.name: path.stat().st_mtime_ns for path in (run.folder / "checkpoints").iterdir()}
    code, _, stderr = start_run(recipe, run.folder, *SETTINGS, "--resume").finish()
    assert code == 2
    said = (
        f"checkpoint {newest} is damaged: the contents of {shard.name} have changed; remove that folder to go on from"
    )
    assert stderr.count("\n") == 1
    assert f"{said} step-000004" in stderr
    shard.write_bytes(content[:-1])  # seen before anything is started
    code, _, stderr = start_run(recipe, run.folder, *SETTINGS, "--resume").finish()
    assert (code, stderr.count("\n")) == (2, 1)
    assert f"{shard.name} is missing or has another size; remove that folder to go on from step-000004" in stderr
    assert {path.name: path.stat().st_mtime_ns for path in (run.folder / "checkpoints").iterdir()} == before
    shutil.rmtree(newest)
    assert outcome(start_run(recipe, run.folder, *SETTINGS, "--resume")) == undisturbed


def test_killed_before_the_last_checkpoint_is_whole(undisturbed: Outcome, started, recipe: Path, start_run) -> None:
    """The broker knows of every step by then; the learner takes the last ones again, and writes the checkpoint."""
    run = started(STEPS)
    run.kill_all()
    last = run.folder / "checkpoints" / f"step-{STEPS:06d}"
    if last.exists():
        last.rename(run.folder.parent / "as if it had come a moment earlier")
    assert outcome(start_run(recipe, run.folder, *SETTINGS, "--resume")) == undisturbed
