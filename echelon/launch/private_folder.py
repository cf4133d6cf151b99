"""A folder for a role's keys, on a machine that is not the supervisor's: private, and gone when its process is."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

FILE_MODE = 0o600
REMOVE = 'exec 3<&0; { read _ <&3; rm -rf -- "$1"; } &'
"""A background job's own stdin is /dev/null, so the pipe goes by another number."""


class PrivateFolder:
    """mode 0700, files 0600. A SIGKILL of the process that made it cannot be answered by that one, so a shell waits
    for the end of a pipe from it, in a session of its own, and removes the folder then.

    The shell is nobody's child: a worker process of Ray 2.60, which is what makes these folders, kills its children on
    its way out, as where its node is lost.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="echelon-role-"))
        read_end, write_end = os.pipe()
        self._pipe = open(write_end, "wb", buffering=0)  # noqa: SIM115 - open as long as this process lives
        subprocess.run(
            ["/bin/sh", "-c", REMOVE, "sh", str(self.path)],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )
        os.close(read_end)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Args: files: by their path in the folder."""
        for name, content in files.items():
            file = self.path / name
            file.parent.mkdir(mode=0o700, exist_ok=True)
            file.touch(FILE_MODE)
            file.write_bytes(content)

    def remove(self) -> None:
        """Harmless when called again."""
        self._pipe.close()
        shutil.rmtree(self.path, ignore_errors=True)
