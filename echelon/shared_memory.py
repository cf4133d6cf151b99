"""A run's folder in shared memory, for copies of the learner's state and for versions; gone with the run in any case.

A run that ends removes its folder. One that was killed altogether cannot; but the kernel lets go of its lock, and the
next run of the same user, on the same machine, removes whatever nobody holds.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "echelon-"


@contextmanager
def shared_memory(
    run_id: str, wanted: bool = True, parent: Path = SHARED_MEMORY, advice: str = "set learner.memory_copy_every to 0"
) -> Iterator[Path | None]:
    """A new folder that only this user can enter, held as long as this process lives; None where none is wanted.

    What other runs have left behind goes. Args: advice: what to do where there is no shared memory.
    Raises: ValueError, in one line, where there is none.
    """
    remove_abandoned(parent)
    if not wanted:
        yield None
        return
    folder, descriptor = _claim_new(run_id, parent, advice)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Folders of this user's runs that no process holds. Symbolic links and other users' folders are left alone."""
    for folder in parent.glob(f"{PREFIX}*"):
        descriptor = _open_own(folder)
        if descriptor is None:
            continue
        if _lock(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _claim_new(run_id: str, parent: Path, advice: str) -> tuple[Path, int]:
    while True:
        try:  # mode 0700, and a name that nobody can have taken before
            folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{run_id}-", dir=parent))
        except OSError as error:
            raise ValueError(f"no folder in shared memory, {parent}: {error.strerror}; {advice}") from None
        descriptor = _open_own(folder)
        if descriptor is not None:
            if _lock(descriptor) and folder.exists():
                return folder, descriptor
            os.close(descriptor)  # another run, just starting, took it for abandoned


def _open_own(folder: Path) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(descriptor).st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
