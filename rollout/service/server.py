"""The HTTP server: from a port to the last request.

At SIGTERM it takes nothing more and lets what has begun finish; after `drain_s` the rest is cut off. Should even that
not end, a thread that waits for nothing ends the process: the engine's processes end with it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from rollout.engine.base import EngineDead
from rollout.engine.vllm_served import ServedEngine
from rollout.service.doors import Doors

logger = logging.getLogger(__name__)

BACKLOG = 2048
LOOK_EVERY_S = 0.5
CUT_OFF_S = 5.0
"""For requests that are cut off to be gone."""
LAST_S = 20.0
"""After the drain, for engine and pools to end by themselves."""
CUT_OFF_CODE = 1


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the engine starts; connections are refused until the server serves.

    Raises: ValueError, one line.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine: {error.strerror}") from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from None
    return taken


class HttpServer:
    """Serves until it is told to stop, or the engine dies."""

    def __init__(
        self, doors: Doors, taken: socket.socket, engine: ServedEngine, drain_s: float, ready: Callable[[], None]
    ) -> None:
        """Args: ready: called once requests are answered."""
        self._doors = doors
        self._socket = taken
        self._engine = engine
        self._drain_s = drain_s
        config = uvicorn.Config(
            doors, log_level="warning", access_log=False, backlog=BACKLOG, server_header=False, lifespan="on"
        )
        self._server = _Server(config, ready)
        self._signal = 0

    def stop(self, number: int) -> None:
        """SIGTERM: drain. SIGINT: a person is waiting. The second of either: at once."""
        if self._signal:
            os._exit(128 + number)
        self._signal = number
        limit_s = self._drain_s if number == signal.SIGTERM else 0.0
        logger.info("told to stop: %d requests have %g s", self._doors.inside, limit_s)
        self._end(limit_s)

    async def serve(self, broken: "asyncio.Future[None]") -> int:
        """Exit code: 0, 1 where requests were cut off, 130 after Ctrl-C. Raises: EngineDead; what `broken` does."""
        watch = asyncio.ensure_future(self._watch(broken))
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        cut_off = await self._cut_off()
        if broken.done():
            broken.result()
        if self._engine.is_dead:
            raise EngineDead("vLLM's engine process has died; see the log above")
        if self._signal == signal.SIGINT:
            return 128 + signal.SIGINT
        return CUT_OFF_CODE if cut_off else 0

    async def _watch(self, broken: "asyncio.Future[None]") -> None:
        while not (broken.done() or self._engine.is_dead):
            await asyncio.sleep(LOOK_EVERY_S)
        self._end(0.0)

    def _end(self, limit_s: float) -> None:
        self._doors.draining = True
        _end_by_force(limit_s + CUT_OFF_S + LAST_S)
        self._server.config.timeout_graceful_shutdown = limit_s  # type: ignore[assignment]
        self._server.should_exit = True

    async def _cut_off(self) -> int:
        """How many requests were not finished."""
        deadline = time.monotonic() + CUT_OFF_S
        while self._doors.inside and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        cut_off = self._doors.cut_off + self._doors.inside
        logger.info("stopped: %s", f"{cut_off} requests were given up" if cut_off else "every request was finished")
        return cut_off


class _Server(uvicorn.Server):
    """Signals are for the caller, who is told when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_by_force(after_s: float) -> None:
    def end() -> None:
        time.sleep(after_s)
        logger.error("not stopped after %g s; ending by force", after_s)
        os._exit(CUT_OFF_CODE)

    threading.Thread(target=end, name="end-by-force", daemon=True).start()


def address_of(taken: socket.socket) -> str:
    """As a URL."""
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
