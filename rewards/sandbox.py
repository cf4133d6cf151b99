"""Runs generated code where it can do no harm; see docs/guide/sandbox.md.

A keeper, a process of its own, is walled in once by bubblewrap, by namespaces, or only by limits, and starts every
snippet in a child that it kills with all below it. Bytes and an exit code come back; expected outputs never go there.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rewards.config import SandboxConfig
from rewards.errors import SandboxError
from rewards.jail import rooms
from rewards.jail.keeper import ANSWER, CHECKS, DONE, FAULT, PROGRAM, REQUEST

logger = logging.getLogger(__name__)

KINDS = ("bubblewrap", "namespaces", "rlimits")
START_S = 20.0
SPARE_S = 10.0
"""Beyond a snippet's own time: a keeper that is silent for longer has failed."""
MAX_ANSWER = 4096
ROOT = Path(__file__).resolve().parents[1]
WARNING = (
    "SANDBOX: this kernel or container lets us make no namespaces (%s): generated code runs with resource limits and, "
    "as far as the kernel has seccomp and Landlock, without network, other processes or files outside Python's "
    "library, but with no other walls. Install bubblewrap or allow user namespaces; see docs/guide/sandbox.md"
)


class Outcome(Struct, frozen=True, kw_only=True):
    """exit_code: as subprocess gives it. late: it was killed for its time. Times in seconds, starting it included."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    late: bool
    wall_s: float
    cpu_s: float


class Verdict(Struct, frozen=True, kw_only=True):
    """How many tests passed; `error`, one line, says what the first failure was. fault: the tests cannot be run."""

    passed: int = 0
    total: int = 0
    error: str = ""
    fault: str = ""


class Sandbox:
    """Runs one snippet after another. Not for several threads at once. A keeper that fails is replaced."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.kind = ""
        """What was chosen; "" before `start`."""

    def start(self) -> None:
        """Raises: ValueError, one line, where a kind that was asked for by name cannot be had."""
        if self._process is not None:
            return
        if self.kind:
            self._start(self.kind)
            return
        reasons: list[str] = []
        for kind in KINDS if self._config.kind == "auto" else (self._config.kind,):
            try:
                self._start(kind)
            except SandboxError as error:
                reasons.append(f"{kind}: {error}")
                continue
            self.kind = kind
            if kind == "rlimits" and reasons:
                logger.warning(WARNING, "; ".join(reasons))
            return
        raise ValueError(f"reward.sandbox.kind={self._config.kind}: {'; '.join(reasons)}")

    def run(self, code: str, stdin: str = "", limit_s: float = 10.0) -> Outcome:
        """A program from its start to its end. Raises: SandboxError where the sandbox itself fails."""
        with _Files(code.encode("utf-8", "surrogatepass"), stdin.encode("utf-8", "surrogatepass")) as files:
            exit_code, late, wall_s, cpu_s = self._ask(PROGRAM, files, limit_s)
            return Outcome(
                exit_code=exit_code,
                stdout=files.read(2, self._config.output_bytes),
                stderr=files.read(3, self._config.output_bytes),
                late=late,
                wall_s=wall_s,
                cpu_s=cpu_s,
            )

    def check(
        self, solution: str, tests: Sequence[str], setup: str = "", *, stop: bool = True, limit_s: float = 10.0
    ) -> Verdict:
        """Statements that assert something of a solution, which runs in a process apart from them.

        Args: setup: statements before the tests. stop: at the first that fails. limit_s: for all together.
        Raises: SandboxError where the sandbox itself fails.
        """
        work = json.dumps({"setup": setup, "tests": list(tests), "stop": stop}).encode()
        with _Files(work, solution.encode("utf-8", "surrogatepass")) as files:
            exit_code, late, _, _ = self._ask(CHECKS, files, limit_s)
            written = files.read(3, self._config.output_bytes)
        if late:
            return Verdict(total=len(tests), error=f"took longer than {limit_s:g} s")
        try:
            return msgspec.json.decode(written, type=Verdict)
        except msgspec.MsgspecError:
            return Verdict(total=len(tests), error=f"the tests' process was ended (exit code {exit_code})")

    def close(self) -> None:
        """Ends the keeper, and all that runs below it."""
        process, sock = self._process, self._socket
        self._process = self._socket = None
        if sock is not None:
            sock.close()
        if process is not None:
            process.kill()
            process.wait()

    def _ask(self, kind: bytes, files: "_Files", limit_s: float) -> tuple[int, bool, float, float]:
        self.start()
        assert self._socket is not None
        try:
            self._socket.settimeout(limit_s + SPARE_S)
            socket.send_fds(self._socket, [REQUEST.pack(kind, limit_s)], files.descriptors)
            answer = self._socket.recv(MAX_ANSWER)
        except OSError as error:
            self.close()
            raise SandboxError(f"the sandbox's keeper does not answer: {error}") from None
        except BaseException:  # a deadline's exception, whose answer would be taken for the next snippet's
            self.close()
            raise
        if not answer.startswith(DONE):
            self.close()
            reason = answer.removeprefix(FAULT).decode(errors="replace") or "its keeper has ended"
            raise SandboxError(f"the sandbox failed: {reason}")
        return ANSWER.unpack(answer)[1:]

    def _start(self, kind: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                command = self._command(kind, theirs.fileno())
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"PYTHONHASHSEED": "0", "PATH": "/nowhere", "HOME": rooms.DESK, "LANG": "C.UTF-8"},
                    cwd="/",
                    start_new_session=True,
                )
            except (OSError, SandboxError) as error:
                ours.close()
                raise SandboxError(str(error)) from None
        self._socket = ours
        ours.settimeout(START_S)
        try:
            answer = ours.recv(MAX_ANSWER)
        except OSError as error:
            answer = FAULT + str(error).encode()
        if answer != b"ready":
            self.close()
            raise SandboxError(answer.removeprefix(FAULT).decode(errors="replace") or "its keeper ended at once")

    def _command(self, kind: str, descriptor: int) -> list[str]:
        config = self._config
        room = {
            "apart": kind != "rlimits",
            "memory_bytes": config.memory_bytes,
            "processes": config.processes,
            "files_bytes": config.files_bytes,
            "output_bytes": config.output_bytes,
        }
        settings = json.dumps({"kind": kind, "room": room})
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from rewards.jail.keeper import main; main()"
        python = [interpreter(), "-s", "-S", "-P", "-c", code, str(descriptor), settings]
        return [*bubblewrap(), *python] if kind == "bubblewrap" else python


def interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def bubblewrap() -> list[str]:
    """A command up to where the keeper's begins. Raises: SandboxError where it is not installed or would do less."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not installed")
    if os.geteuid() == 0:
        raise SandboxError("run as root it cannot limit processes; namespaces can, which give root up first")
    library = sysconfig.get_paths()["stdlib"]
    seen = [*rooms.SYSTEM_LIBRARIES, *rooms.shared_libraries(), library, interpreter(), rooms.LINKER_CACHE]
    seen += [str(ROOT / "rewards" / "jail"), str(ROOT / "rewards" / "__init__.py")]
    words = ["--unshare-user", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--die-with-parent", "--uid", str(rooms.USER), "--gid", str(rooms.USER), "--cap-add", "ALL"]
    for path in dict.fromkeys(seen):
        words += ["--ro-bind-try", path, path]
    for path in rooms.DEVICES:
        words += ["--dev-bind-try", path, path]
    return [program, *words, "--dir", rooms.DESK, "--remount-ro", "/", "--chdir", "/", "--"]


class _Files:
    """The four files of a request, in memory: code, stdin, stdout, stderr."""

    def __init__(self, code: bytes, stdin: bytes) -> None:
        self.descriptors = [os.memfd_create(name) for name in ("code", "stdin", "stdout", "stderr")]
        for descriptor, content in zip(self.descriptors, (code, stdin), strict=False):
            write_all(descriptor, content)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def read(self, place: int, limit: int) -> bytes:
        return os.pread(self.descriptors[place], limit, 0)


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def tells_signal(exit_code: int) -> str:
    """`SIGKILL` for -9; "" for a code that is no signal's."""
    return signal.Signals(-exit_code).name if -64 < exit_code < 0 else ""
