"""A network link of a given speed, as a relay between real sockets: what a benchmark's peers connect through."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIECE_BYTES = 1 << 16
BURST_S = 0.005
"""What may go at once is what the link carries in so long."""


class TokenBucket:
    """Bytes that may pass: `rate` a second, and no more than a burst saved up."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Wait until they have passed. All that goes one way shares the link."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - BURST_S) + num_bytes / self._rate
            wait_s = self._free_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


@contextmanager
def paced_link(address: str, gbit_s: float) -> Iterator[str]:
    """A tcp address that leads to the one given, at `gbit_s` each way."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    there, back = (TokenBucket(gbit_s * 1e9 / 8) for _ in range(2))
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with suppress(OSError):  # closed: the benchmark is over
                while True:
                    near, _ = server.accept()
                    far = socket.create_connection((host, int(port)))
                    sockets.extend((near, far))
                    for each in (near, far):  # else what was asked waits for what was answered, 40 ms at a time
                        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for source, target, bucket in ((near, far, there), (far, near, back)):
                        threading.Thread(target=_relay, args=(source, target, bucket), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for each in sockets:
            each.close()


def _relay(source: socket.socket, target: socket.socket, bucket: TokenBucket) -> None:
    with suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            bucket.take(len(piece))
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
