"""Locked files as signs of life: the kernel lets go of a lock with the process that has it."""

import fcntl
import os
from pathlib import Path


def is_locked(path: Path) -> bool:
    """Does a process hold the file's lock? Tells by a lock of its own, shared, that it lets go of at once: those who
    look do not get in one another's way. False where there is no such file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
