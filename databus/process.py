"""Ties a process's life to its parent's, so that nothing of a run outlives it."""

import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
MAIN_PID_VARIABLE = "ECHELON_PID"
"""Process id of the command that a person started; its children inherit it."""
GARBAGE_THRESHOLD = 50_000
"""Objects; Python's own is 700."""


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


def collect_garbage_seldom() -> None:
    """For a process that makes hardly any cycles, and many messages: looking for the ones among the others takes time.

    What there is by now is not looked at again. Call it once everything is set up.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)
