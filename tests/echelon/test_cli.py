"""The command line from outside: exit codes and single lines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def echelon(*arguments: str | Path) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "echelon", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return result.returncode, result.stdout, result.stderr


def one_line(*arguments: str | Path) -> str:
    """What a command with bad input says."""
    code, _, stderr = echelon(*arguments)
    assert code == 2, stderr
    assert stderr.startswith("echelon: ")
    assert stderr.count("\n") == 1, stderr
    return stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')
    file = tmp_path / "mine.py"
    file.write_text(
        "from echelon.config import *\ndef recipe():\n"
        f"    return RunConfig(model='./none', data=DataConfig(train={str(tmp_path / 'train.jsonl')!r}))\n"
    )
    return file


def test_help() -> None:
    code, stdout, _ = echelon("--help")
    assert code == 0
    named = {line.split()[0] for line in stdout.splitlines() if line.startswith("    ") and line.strip()}
    assert {"run", "worker", "watch", "export", "audit", "replay", "bench-draft"} <= named


def test_unknown_command_and_argument(recipe: Path) -> None:
    assert "invalid choice: 'trian'" in one_line("trian")
    assert "required: COMMAND" in one_line()
    assert "unknown argument '--steps'" in one_line("run", recipe, "--steps", "3")
    assert "unknown argument 'x'" in one_line("watch", "a", "x")


def test_bench_draft_takes_sensible_drafts() -> None:
    assert "expected a whole number from 1 to 64, got '65'" in one_line("bench-draft", "x", "--max-tokens", "65")
    assert "invalid choice: 'off'" in one_line("bench-draft", "x", "--policy", "off")


def test_missing_recipe(tmp_path: Path) -> None:
    assert one_line("run", tmp_path / "none.py") == f"echelon: no such recipe: {tmp_path / 'none.py'}\n"


def test_overrides_may_stand_on_both_sides_of_options(recipe: Path, tmp_path: Path) -> None:
    for words in (["learner.lrr=1", "--run-dir", tmp_path / "run"], ["--run-dir", tmp_path / "run", "learner.lrr=1"]):
        assert "did you mean learner.lr?" in one_line("run", recipe, *words)


def test_missing_model_folder(recipe: Path, tmp_path: Path) -> None:
    assert "model=./none: no such folder" in one_line("run", recipe, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_needs_a_folder(recipe: Path) -> None:
    assert "--resume needs --run-dir" in one_line("run", recipe, "--resume")


@pytest.mark.parametrize("command", [["watch"], ["worker", "--join"], ["export"], ["bench-draft"]])
def test_not_a_run_folder(command: list[str], tmp_path: Path) -> None:
    words = [*command, tmp_path, *([tmp_path / "out"] if command == ["export"] else [])]
    assert "is not a run's folder: it has no config.json" in one_line(*words)


def test_a_traceback_only_on_request(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHELON_TRACEBACK", "1")
    _, _, stderr = echelon("run", recipe)
    assert "Traceback" in stderr
