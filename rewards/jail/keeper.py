"""The sandbox's keeper: a small process that walls itself in, and then starts snippets, each in a child of its own.

    python -s -S -P -c 'from rewards.jail.keeper import main; main()' SOCKET SETTINGS

It never sees an expected output. A snippet is forked from it, not executed, which spares Python's start; it has the
standard library, and nothing of ours. The life of a snippet, where there are namespaces:

    keeper ── launcher: namespaces of processes and mounts ── first process: /tmp, reaps ── the snippet

One that is killed takes all below it along; the keeper takes in who lost its parent, and answers when none is left.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable

from rewards.jail import linux, rooms
from rewards.jail.checks import split

ANSWER = struct.Struct("<ci?dd")
"""`DONE`; exit code, as Python's subprocess gives it; whether it was killed for its time; seconds; seconds of CPU."""
EXIT_CODE = struct.Struct("<i")
REQUEST = struct.Struct("<cd")
"""What to run, `PROGRAM` or `CHECKS`; its time limit in seconds. File descriptors: the code, stdin, stdout, stderr."""
PROGRAM, CHECKS = b"p", b"c"
DONE = b"="
FAULT = b"!"
"""An answer that begins with it is a text: the sandbox failed, not the snippet."""
NUM_FILES = 4
USEFUL = (
    "bisect",
    "collections",
    "copy",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "string",
    "threading",
)
"""Most snippets import them: loaded once."""


class Parted(Exception):
    """Whoever asked is gone."""


def main() -> None:
    """Answers requests until the socket closes. argv: the socket's descriptor, settings as JSON (`rooms.enter`)."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    parent = os.getppid()
    try:
        room = rooms.enter(json.loads(sys.argv[2]))
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # giving up root has cleared it
        if os.getppid() not in (parent, 0):  # 0: in a namespace of process ids, which ends with its maker
            return
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        sys.path[:] = [path for path in sys.path if path in room.library]
        for name in USEFUL:
            __import__(name)
    except OSError as error:
        sock.send(FAULT + str(error).encode())
        return
    gc.freeze()
    sock.send(b"ready")
    task = None
    with contextlib.suppress(Parted, ConnectionError):
        while task is None:
            task = serve(sock, room)
    if task is not None:  # in the snippet's process, with nothing of the keeper on its stack but this
        sock.detach()
        task()


def serve(sock: socket.socket, room: "rooms.Room") -> Callable[[], None] | None:
    """Answers one request; in the snippet's own process, what it is to do instead. Raises: Parted."""
    message, files, _, _ = socket.recv_fds(sock, REQUEST.size, NUM_FILES)
    if not message:
        raise Parted
    request = REQUEST.unpack(message)
    reading, writing = os.pipe()
    started = time.monotonic()
    keeper = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        return start(request, files, writing, room, keeper)
    os.close(writing)
    for file in files:
        os.close(file)
    late, cpu_s = wait(child, sock, request[1], room)
    report = os.read(reading, 4096)
    os.close(reading)
    if report and len(report) != EXIT_CODE.size:
        sock.send(report)
    else:
        code = EXIT_CODE.unpack(report)[0] if report else -signal.SIGKILL
        sock.send(ANSWER.pack(DONE, code, late, time.monotonic() - started, cpu_s))
    return None


def wait(child: int, sock: socket.socket, limit_s: float, room: "rooms.Room") -> tuple[bool, float]:
    """(out of time, seconds of CPU) once the child and all below it are gone. Raises: Parted, likewise."""
    watched = os.pidfd_open(child)
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    poll.register(sock, select.POLLIN | select.POLLHUP)
    ready = {descriptor for descriptor, _ in poll.poll(limit_s * 1000)}
    os.close(watched)
    if watched not in ready:
        os.kill(child, signal.SIGKILL)
    cpu_s = 0.0
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            pid, _, usage = os.wait4(-1, 0 if room.apart else os.WNOHANG)
            if pid == 0:
                rooms.kill_children()
                time.sleep(0.001)
            else:
                cpu_s += usage.ru_utime + usage.ru_stime
    if ready and watched not in ready:
        raise Parted
    return not ready, cpu_s


def start(
    request: tuple[bytes, float], files: list[int], report: int, room: "rooms.Room", keeper: int
) -> Callable[[], None]:
    """In a fresh child of the keeper: becomes the snippet's process, or the ones above it, which do not return."""
    kind, limit_s = request
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        if room.apart:
            linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
            descend(None)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        room.furnish()
        descend(report)
        os.setsid()
        code, *streams = files
        for place, file in enumerate((*streams, code)):
            os.dup2(file, place)
        os.closerange(len(files), 4096)
        task = split(3, 2) if kind == CHECKS else program(3)
        room.limit(limit_s)
    except OSError as error:
        os.write(report, FAULT + str(error).encode())
        os._exit(1)
    gc.unfreeze()
    open_streams()
    return task


def descend(report: int | None) -> None:
    """Fork, and go on in the child, which ends with its parent; that one reaps until it has ended, says how."""
    above = os.pidfd_open(os.getpid())
    child = os.fork()
    if child > 0:
        while True:
            pid, status = os.wait()
            if pid == child:
                break
        if report is not None:
            os.write(report, EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([above], [], [], 0)[0]:  # it ended before it could take us along
        os._exit(1)
    os.close(above)


def open_streams() -> None:
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def program(file: int) -> Callable[[], None]:
    """As `python FILE` would: the module is `__main__`, an exception is told on stderr and exits with 1."""
    code = os.pread(file, os.fstat(file).st_size, 0)
    os.close(file)

    def run() -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        sys.argv = ["main.py"]
        exec(compile(code, "main.py", "exec", dont_inherit=True), module.__dict__)

    return run
