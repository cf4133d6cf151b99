"""A child process for what may hang, or may take its process down with it: it is told one thing at a time, and killed
where it does not answer in time. NCCL and the GPU's driver are such: no call of theirs can be given up for certain.

Messages are msgspec structs over a socket pair that keeps them apart, so each is small: at most some 100 KiB.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from msgspec import Struct

from databus.codec import encode_header
from databus.process import PARENT_VARIABLE

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 16
POLL_S = 0.1
END_S = 2.0


class HelperError(Exception):
    """It does not answer, or has ended. One line for a person. It is dead by then."""


class Helper:
    """One thread at a time."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Args: command: after the interpreter; the number of the child's end of the socket comes last. environment:
        beyond this process's own. Raises: OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        # The kernel ends a child that asked for it when the *thread* that made it ends: this one stays for as long.
        made: Future[subprocess.Popen[bytes]] = Future()
        arguments = [sys.executable, *command, str(theirs.fileno())]
        variables = {**os.environ, **(environment or {}), PARENT_VARIABLE: str(os.getpid())}
        self._thread = threading.Thread(
            target=_tend, args=(arguments, theirs.fileno(), variables, made), name="helper", daemon=True
        )
        self._thread.start()
        try:
            self._process = made.result()
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Struct) -> None:
        """Raises: HelperError."""
        try:
            self._socket.send(encode_header(message))
        except OSError as error:
            raise self._dead(f"could not be told anything: {error.strerror}") from None

    def receive(self, timeout_s: float, stop: threading.Event | None = None) -> bytes:
        """Its next message. Args: stop: once set, nobody waits any more. Raises: HelperError."""
        deadline = time.monotonic() + timeout_s
        while (message := self.poll(POLL_S)) is None:
            if stop is not None and stop.is_set():
                raise self._dead("was given up")
            if time.monotonic() >= deadline:
                raise self._dead(f"did not answer within {timeout_s:g} s")
        return message

    def poll(self, wait_s: float = 0.0) -> bytes | None:
        """Its next message, if there is one. Raises: HelperError where it has ended."""
        readable, _, _ = select.select([self._socket], [], [], wait_s)
        if not readable:
            return None
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise self._dead(str(error.strerror)) from None
        if not message:
            raise self._dead("has ended")
        return message

    def kill(self) -> None:
        """Harmless when called again."""
        self._socket.close()
        self._process.kill()
        self._thread.join(END_S)
        if self._thread.is_alive():  # stuck in the driver: the kernel ends it once that returns
            logger.warning("process %d has not ended within %g s", self.pid, END_S)

    def _dead(self, why: str) -> HelperError:
        self.kill()
        return HelperError(f"process {self.pid} {why}")


def _tend(
    arguments: Sequence[str], descriptor: int, variables: Mapping[str, str], made: "Future[subprocess.Popen[bytes]]"
) -> None:
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=2,  # libraries print there; this process's own output is not theirs
            pass_fds=(descriptor,),
            env=variables,
        )
    except BaseException as error:
        made.set_exception(error)
        return
    made.set_result(process)
    process.wait()


class Channel:
    """The child's end."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)

    def send(self, message: Struct) -> None:
        """Raises: OSError where the parent has gone."""
        self._socket.send(encode_header(message))

    def receive(self) -> bytes:
        """Waits for as long as the parent lives. Empty where it has closed its end."""
        return self._socket.recv(MAX_MESSAGE_BYTES)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Of what may be many lines, as torch's are."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
