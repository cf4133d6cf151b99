import subprocess
from pathlib import Path

from echelon.git_state import git_state


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def test_a_commit_and_what_is_not_in_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "a").write_text("1")
    assert git_state(tmp_path) == {}, "there is no commit yet"
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "branch": "main", "changed_files": 0}
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("3")
    (tmp_path / "folder").mkdir()
    assert git_state(tmp_path / "folder")["changed_files"] == 2


def test_no_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}
    assert git_state(tmp_path / "no such folder") == {}
