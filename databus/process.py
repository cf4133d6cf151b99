"""A process's life: tied to its parent's, so that nothing of a run outlives it; and how it ends by itself."""

import atexit
import ctypes
import gc
import multiprocessing.spawn
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

PR_SET_PDEATHSIG = 1
MAIN_PID_VARIABLE = "ECHELON_PID"
"""Process id of the command that a person started; its children inherit it."""
PARENT_VARIABLE = "ECHELON_PARENT"
"""Process id of the one that starts a process, for that one alone."""
GARBAGE_THRESHOLD = 50_000
"""Objects; Python's own is 700."""


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it ends. Linux; elsewhere it does nothing.

    A process whose parent has died already ends here: it was handed to init, or is below another than it was told. In a
    container the command itself may be process 1, and is then a parent like any other.
    """
    made_by = os.environ.pop(PARENT_VARIABLE, "")
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent or _is_orphan(parent, made_by):
        os._exit(1)


def _is_orphan(parent: int, made_by: str) -> bool:
    """Not every orphan goes to init: one below a subreaper, such as a service manager, does not."""
    if made_by:
        return made_by != str(parent)
    return parent == 1 and os.environ.get(MAIN_PID_VARIABLE) != "1"


@contextmanager
def spawned_die_with_parent() -> Iterator[None]:
    """What multiprocessing spawns inside ends with the thread that spawned it, from its first line on. Linux; elsewhere
    it does nothing.

    A target that calls `die_with_parent` comes too late for a parent that dies while the child imports: with torch and
    vLLM that takes ten seconds. What is forked is not concerned.
    """
    original = multiprocessing.spawn.get_command_line
    if sys.platform.startswith("linux"):
        multiprocessing.spawn.get_command_line = lambda **fields: _tied(original(**fields))
    try:
        yield
    finally:
        multiprocessing.spawn.get_command_line = original


def _tied(command: list[str]) -> list[str]:
    """Python's `[..., "-c", program, "--multiprocessing-fork"]`, with our own first lines. It may not find our packages
    before it has been told where they are."""
    lines = [
        "import ctypes, os",
        f"ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0)",
        f"if os.getppid() != {os.getpid()}: os._exit(1)",
    ]
    program = command.index("-c") + 1
    return [*command[:program], "\n".join([*lines, command[program]]), *command[program + 1 :]]


def collect_garbage_seldom() -> None:
    """For a process that makes hardly any cycles, and many messages: looking for the ones among the others takes time.

    What there is by now is not looked at again. Call it once everything is set up.
    """
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, 20, 20)


def run_as_program(main: Callable[[], int]) -> NoReturn:
    """Run `main` as all that this process is for. An exception that it lets out ends the process as Python does."""
    try:
        code = main()
    except SystemExit as left:
        if not isinstance(left.code, int):
            raise
        code = left.code
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End as Python does: threads are joined, what was registered for the exit is run, output is written.

    But nothing is taken apart. With torch and vLLM loaded that takes a second, and libraries of theirs fill the last
    lines of a log, which people read first, with what they find left over. `multiprocessing` ends its processes so.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
