"""Asks the broker how the run stands."""

import contextlib
import os
import socket
import time

from databus.client import BusClient
from databus.errors import BusError
from databus.messages import Hello, Status, StatusRequest
from echelon.run_folder import BusRecord

ASK_EVERY_S = 0.5
CONNECT_S = 10.0


class Observer:
    """Never waits, and never fails: a broker that does not answer is one that says nothing."""

    def __init__(self, bus: BusRecord) -> None:
        """Connects, which may take a moment."""
        hello = Hello(
            role="observer",
            name=f"observer-{socket.gethostname()}-{os.getpid()}",
            run_id=bus.run_id,
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        self._client = BusClient(bus.address, hello, keys=bus.client_keys("observer"))
        self._asked = 0.0
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
                status = arrived.message if isinstance(arrived.message, Status) else status
            if not self.lost and time.monotonic() - self._asked >= ASK_EVERY_S:
                self._asked = time.monotonic()
                self._client.send(StatusRequest())
        except BusError:
            self.lost = True
        return status

    def close(self) -> None:
        """Of a connection that was lost there is still something to let go of."""
        with contextlib.suppress(BusError):
            self._client.close(goodbye=None if self.lost else "seen enough")
