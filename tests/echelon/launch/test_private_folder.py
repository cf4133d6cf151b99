import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

from echelon.launch.private_folder import PrivateFolder

ROOT = Path(__file__).resolve().parents[3]
HOLDS_A_KEY = """
import time
from echelon.launch.private_folder import PrivateFolder
folder = PrivateFolder()
folder.write({"keys/worker.key": b"secret"})
print(folder.path, flush=True)
time.sleep(60)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_reads_it_and_it_goes() -> None:
    folder = PrivateFolder()
    folder.write({"config.json": b"{}", "keys/worker.key": b"secret"})
    key = folder.path / "keys" / "worker.key"
    assert (mode(folder.path), mode(key.parent), mode(key)) == (0o700, 0o700, 0o600)
    assert key.read_bytes() == b"secret"
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_it_goes_with_a_process_that_is_killed() -> None:
    command = [sys.executable, "-c", HOLDS_A_KEY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert (path / "keys" / "worker.key").exists()
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not path.exists()
