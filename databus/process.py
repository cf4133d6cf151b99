"""Ties a process's life to its parent's, so that nothing of a run outlives it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
MAIN_PID_VARIABLE = "ECHELON_PID"
"""Process id of the command that a person started; its children inherit it."""


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends. Linux; elsewhere it does nothing.

    A process whose parent has died already, and which was handed to init, ends here. In a container the command
    itself may be process 1, and is then a parent like any other.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    orphaned = parent == 1 and os.environ.get(MAIN_PID_VARIABLE) != "1"
    if os.getppid() != parent or orphaned:
        os._exit(1)
