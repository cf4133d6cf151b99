"""The learner's end of the bus: what the trainer needs of a connection, and waiting for one answer."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from databus.codec import Frame
from databus.messages import Refused, Stop, Welcome

Reply = TypeVar("Reply", bound=Struct)

POLL_S = 1.0
RESEND_S = 30.0


class Bus(Protocol):
    """A connection to the broker; it says hello, and its heartbeats are its own business."""

    def send(self, message: Any) -> None: ...

    def recv(self, timeout: float) -> tuple[Any, Sequence[Frame]] | None:
        """The next message with its frames; None if none came within `timeout` seconds."""
        ...


class RunStoppedError(Exception):
    """The broker ended the run; `ok` where nothing had failed."""

    def __init__(self, reason: str, ok: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ok = ok


def nothing() -> None:
    """What there is to do while waiting, by default."""


class BrokerLink:
    """Questions to the broker over a `Bus`, one at a time."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._stopped = False
        self._said: dict[type[Struct], Struct] = {}
        self._telling = threading.Lock()

    def send(self, message: Struct) -> None:
        """Tell the broker something; the last of each kind is told again with every question that is asked again.

        From any thread: versions are published from one of their own.
        """
        with self._telling:
            self._said[type(message)] = message
            self._bus.send(message)

    def _say_again(self) -> None:
        """A message may have been lost; the broker ignores copies."""
        with self._telling:
            for message in self._said.values():
                self._bus.send(message)

    def request(
        self,
        question: Struct,
        reply_type: type[Reply],
        wanted: Callable[[Reply], bool],
        timeout_s: float,
        *,
        while_waiting: Callable[[], None] = nothing,
        through_stop: bool = False,
        first_poll_s: float = POLL_S,
    ) -> tuple[Reply, Sequence[Frame]]:
        """Ask and wait for the answer; ask again every `RESEND_S`, should the broker have restarted.

        Answers to earlier questions and other messages are passed over. `while_waiting` is called after
        `first_poll_s`, and about every `POLL_S` from then on. With `through_stop`, a good end of the run that is
        announced meanwhile is noted and waiting goes on.
        Raises: RunStoppedError; RuntimeError if the broker refuses, or does not answer within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        resend_at, poll_s = 0.0, first_poll_s
        while (now := time.monotonic()) < deadline:
            if now >= resend_at:
                if resend_at:
                    self._say_again()
                self._bus.send(question)
                resend_at = now + RESEND_S
            received = self._receive(min(poll_s, deadline - now), through_stop)
            if received is None:
                while_waiting()
                poll_s = POLL_S
            elif isinstance(received[0], Welcome):
                resend_at = 0.0
            elif isinstance(received[0], reply_type) and wanted(received[0]):
                return received
        raise RuntimeError(f"no {reply_type.__name__} from the broker within {timeout_s:.0f} s of asking {question}")

    def wait_for_stop(self, timeout_s: float) -> None:
        """Raises: RunStoppedError if something failed; RuntimeError if the run does not end within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        resend_at = time.monotonic() + RESEND_S
        while not self._stopped:
            now = time.monotonic()
            if now >= deadline:
                raise RuntimeError(f"the broker did not end the run within {timeout_s:.0f} s of its last step")
            if now >= resend_at:
                self._say_again()
                resend_at = now + RESEND_S
            self._receive(min(POLL_S, deadline - now), through_stop=True)

    def _receive(self, timeout: float, through_stop: bool) -> tuple[Any, Sequence[Frame]] | None:
        received = self._bus.recv(timeout)
        match received:
            case (Stop(reason=reason, ok=ok), _):
                if not (ok and through_stop):
                    raise RunStoppedError(reason, ok)
                self._stopped = True
            case (Welcome(), _):  # of a new broker, or one that had given this learner up
                self._say_again()
            case (Refused(reason=reason), _):
                raise RuntimeError(f"the broker refused the learner: {reason}")
        return received
