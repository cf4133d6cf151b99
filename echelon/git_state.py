"""Which state of the code a run is of."""

import subprocess
from pathlib import Path

TIMEOUT_S = 10.0


def git_state(folder: Path) -> dict[str, str | int]:
    """`commit`, `branch` and `changed_files` of the repository that `folder` lies in; {} where there is none.

    changed_files counts those that are not committed, new ones among them: 0 says that the commit is all there is.
    """
    try:
        commit, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
        changed = _git(folder, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "branch": branch, "changed_files": len(changed.splitlines())}


def _git(folder: Path, *words: str) -> str:
    # --no-optional-locks: a look must not hold up the user's own git.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return result.stdout.strip()
