import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from echelon.shared_memory import remove_abandoned, shared_memory

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from echelon.shared_memory import shared_memory
with shared_memory("theirs", parent=Path(sys.argv[1])) as folder:
    (folder / "step-000001").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_private_and_gone_with_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyError), shared_memory("run-1", parent=tmp_path) as folder:
        assert folder is not None
        assert folder.name.startswith("echelon-run-1-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "step-000001").mkdir()
        (folder / "step-000001" / "weights").touch()
        raise KeyError  # however it ends
    assert names(tmp_path) == []


def test_none_where_none_is_wanted(tmp_path: Path) -> None:
    with shared_memory("run-1", wanted=False, parent=tmp_path) as folder:
        assert folder is None
        assert names(tmp_path) == []


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    with shared_memory("run-1", parent=tmp_path) as ours, shared_memory("run-1", parent=tmp_path) as theirs:
        assert ours != theirs
        assert len(names(tmp_path)) == 2


def test_sigkill_leaves_what_the_next_run_removes(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        remove_abandoned(tmp_path)
        assert (theirs / "step-000001").is_dir(), "somebody holds it"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        assert theirs.is_dir()
        with shared_memory("ours", wanted=False, parent=tmp_path):
            assert names(tmp_path) == []
    finally:
        holder.kill()
        holder.communicate()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    elsewhere, parent = tmp_path / "elsewhere", tmp_path / "shm"
    for folder in (elsewhere, parent, parent / "other-thing"):
        folder.mkdir()
    (parent / "echelon-link").symlink_to(elsewhere)
    (parent / "echelon-file").touch()
    remove_abandoned(parent)
    assert names(parent) == ["echelon-file", "echelon-link", "other-thing"]
    assert elsewhere.is_dir()


def test_another_users_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echelon-theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["echelon-theirs"]


def test_no_shared_memory_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^no folder in shared memory, .*; set learner\.memory_copy_every to 0$"),
        shared_memory("run-1", parent=tmp_path / "nowhere"),
    ):
        pass
