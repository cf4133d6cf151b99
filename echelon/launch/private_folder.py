"""A folder for a role's keys, on a machine that is not the supervisor's: private, and gone when its process is."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

FILE_MODE = 0o600
REMOVE = 'read _; rm -rf -- "$1"'
END_S = 5.0


class PrivateFolder:
    """mode 0700, files 0600. A SIGKILL of the process that made it cannot be answered by that one, so a shell waits
    for the end of a pipe from it, in a session of its own, and removes the folder then."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="echelon-role-"))
        self._remover = subprocess.Popen(
            ["/bin/sh", "-c", REMOVE, "sh", str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def write(self, files: Mapping[str, bytes]) -> None:
        """Args: files: by their path in the folder."""
        for name, content in files.items():
            file = self.path / name
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.touch(FILE_MODE)
            file.write_bytes(content)

    def remove(self) -> None:
        """Harmless when called again."""
        assert self._remover.stdin is not None
        self._remover.stdin.close()
        self._remover.wait(END_S)
        shutil.rmtree(self.path, ignore_errors=True)
