"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second does not wait."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """Somebody wants the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Interrupts:
    """Counts; raising is left to `check`, at a place where everything is in order."""

    def __init__(self, at_once: Callable[[], None]) -> None:
        """Args: at_once: what the second signal does."""
        self._at_once = at_once
        self._first: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Main thread only."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises: Interrupted, once a signal has come."""
        if self._first is not None:
            raise Interrupted(self._first)

    def _note(self, number: int, _frame: object) -> None:
        if self._first is None:
            self._first = number
        else:
            self._at_once()
