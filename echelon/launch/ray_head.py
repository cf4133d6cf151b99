"""The head of a Ray cluster, without which nothing is started, and nothing that ends is heard of."""

import os
import socket
import time

ANSWER_S = 1.0
LOOK_EVERY_S = 2.0
RAY_PATIENCE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
RAY_PATIENCE_S = 60.0


class RayHead:
    """Ray 2.60 ends a driver without a word of ours once the head has been silent for a minute, or as long as its
    variable says. Half of that is left to a head that comes back, and half to end the run in good order.

    lost: it has been silent for too long; from then on Ray is asked for nothing that only the head can do, since such
    calls wait for it.
    """

    def __init__(self, address: str) -> None:
        """Args: address: HOST:PORT."""
        self.lost = False
        self._address = address
        self._patience_s = float(os.environ.get(RAY_PATIENCE_VARIABLE) or RAY_PATIENCE_S) / 2
        self._heard = self._looked = time.monotonic()

    def trouble(self) -> str:
        """Why the run cannot go on; "" where it can. Looks every other second."""
        error = self._look() if time.monotonic() - self._looked >= LOOK_EVERY_S else ""
        if error and self._looked - self._heard > self._patience_s:
            self.lost = True
            return f"the Ray cluster's head {self._address} has not answered for {self._patience_s:g} s: {error}"
        return ""

    def answers(self) -> bool:
        """Now."""
        return not self.lost and not self._look()

    def _look(self) -> str:
        """Why it does not answer, if so. Waits for a second at most."""
        error = _why_silent(self._address)
        self._looked = time.monotonic()
        if not error:
            self._heard = self._looked
        return error


def _why_silent(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except OSError as error:
        return str(error)
    return ""
