"""Asks the broker how the run stands, and for its rows of metrics where the run's folder is not at hand."""

import contextlib
import os
import socket
import time

import msgspec

from databus.client import BusClient
from databus.errors import BusError
from databus.messages import Hello, Rows, Status, StatusRequest, Stop
from echelon.progress import Row
from echelon.run_folder import BusRecord

ASK_EVERY_S = 0.5
CONNECT_S = 10.0


class Observer:
    """Never waits, and never fails: a broker that does not answer is one that says nothing."""

    def __init__(self, bus: BusRecord, with_rows: bool = False) -> None:
        """Connects, which may take a moment. Args: with_rows: ask for rows, too, from the run's first on."""
        hello = Hello(
            role="observer",
            name=f"observer-{socket.gethostname()}-{os.getpid()}",
            run_id=bus.run_id,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        self._client = BusClient(bus.address, hello, keys=bus.client_keys("observer"))
        self._asked = 0.0
        self._next_row = 0 if with_rows else -1
        self._rows: list[Row] = []
        self._status: Status | None = None
        self.lost = False
        try:
            self._client.connect(CONNECT_S)
        except BusError:
            self.lost = True

    def poll(self) -> Status | None:
        """The newest answer since the last call, if there is one; asks again now and then."""
        status: Status | None = None
        try:
            while not self.lost and (arrived := self._client.recv(0)) is not None:
                match arrived.message:
                    case Status() as newest:
                        status = self._status = newest
                    case Stop() as stop:
                        status = self._at_the_end(stop)
                    case Rows(first=self._next_row, rows=rows):
                        self._take(rows)
            if not self.lost and time.monotonic() - self._asked >= ASK_EVERY_S:
                self._ask()
        except BusError:
            self.lost = True
        return status

    def new_rows(self) -> list[Row]:
        """Rows that `poll` has brought since the last call, each once, in their order."""
        rows, self._rows = self._rows, []
        return rows

    def _at_the_end(self, stop: Stop) -> Status | None:
        """What the broker would answer now. It may be gone before it is asked: it waits for no observer."""
        if self._status is None:
            self.lost = True
            return None
        phase, error = ("finished", "") if stop.ok else ("failed", stop.reason)
        return msgspec.structs.replace(self._status, phase=phase, error=error)

    def _take(self, rows: tuple[str, ...]) -> None:
        self._rows += [msgspec.json.decode(row, type=dict) for row in rows]
        self._next_row += len(rows)
        self._ask()  # there may be more

    def _ask(self) -> None:
        self._asked = time.monotonic()
        self._client.send(StatusRequest(rows_from=self._next_row))

    def close(self) -> None:
        """Of a connection that was lost there is still something to let go of."""
        with contextlib.suppress(BusError):
            self._client.close(goodbye=None if self.lost else "seen enough")
