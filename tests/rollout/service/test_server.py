"""The end of the HTTP server, with an app that does as it likes, in a process of its own."""

import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollout.service.server import listen

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60.0

SCRIPT = """
import asyncio, logging, sys
from types import SimpleNamespace
import rollout.service.server as server
from rollout.run import interrupts
from rollout.service.doors import Doors

kind, drain_s = sys.argv[1], float(sys.argv[2])
server.CUT_OFF_S, server.LAST_S = 0.5, 0.5
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
engine = SimpleNamespace(is_dead=False)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
    if kind == "dies":
        engine.is_dead = True
    for _ in range(5 if kind == "finishes" else 1000):
        try:
            await asyncio.sleep(0.1)
        except asyncio.CancelledError:
            if kind != "deaf":
                raise
    await send({"type": "http.response.body", "body": b"done"})

async def main():
    with interrupts() as on_signal:
        taken = server.listen("127.0.0.1", 0)
        ready = lambda: print(taken.getsockname()[1], flush=True)
        http = server.HttpServer(Doors(app, None, None), taken, engine, drain_s, ready)
        on_signal.append(http.stop)
        code = await http.serve(asyncio.get_running_loop().create_future())
    sys.exit(code)

asyncio.run(main())
"""


class Served:
    """One server, and one request that has begun."""

    def __init__(self, script: Path, kind: str, drain_s: float) -> None:
        words = [sys.executable, str(script), kind, str(drain_s)]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.body = b""
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()
        assert self.begun.wait(TIMEOUT_S)

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        connection.request("POST", "/v1/completions")
        try:
            answer = connection.getresponse()
            while part := answer.read1():
                self.body += part
                self.begun.set()
        except (http.client.HTTPException, OSError):
            pass

    def end(self, number: int) -> tuple[int, str]:
        """(exit code, log)"""
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=TIMEOUT_S)
        self.thread.join(TIMEOUT_S)
        return self.process.returncode, log


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    script = tmp_path / "served.py"
    script.write_text(SCRIPT)
    started: list[Served] = []

    def make(kind: str, drain_s: float) -> Served:
        started.append(Served(script, kind, drain_s))
        return started[-1]

    yield make
    for served in started:
        served.process.kill()
        served.process.communicate()


def test_what_has_begun_is_finished(start: Callable[..., Served]) -> None:
    served = start("finishes", 30.0)
    code, log = served.end(signal.SIGTERM)
    assert code == 0, log
    assert served.body == b"begun done"
    assert "every request was finished" in log


@pytest.mark.parametrize("kind", ["endless", "deaf"])
def test_what_is_not_done_in_time_is_given_up(start: Callable[..., Served], kind: str) -> None:
    """`deaf` does not even end when it is cancelled."""
    served = start(kind, 0.3)
    code, log = served.end(signal.SIGTERM)
    assert code == 1, log
    assert served.body == b"begun "
    assert "1 requests were given up" in log


def test_a_person_does_not_wait(start: Callable[..., Served]) -> None:
    code, log = start("endless", 600.0).end(signal.SIGINT)
    assert code == 130, log


def test_the_second_signal_ends_it_at_once(start: Callable[..., Served]) -> None:
    served = start("endless", 600.0)
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + TIMEOUT_S
    while _takes_connections(served.port):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, log = served.end(signal.SIGTERM)
    assert code == 143, log


def test_a_dead_engine_ends_it(start: Callable[..., Served]) -> None:
    code, log = start("dies", 600.0).finish()
    assert code == 1
    assert "vLLM's engine process has died" in log


def test_a_port_in_use_is_said() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)


def test_no_address_is_said() -> None:
    with pytest.raises(ValueError, match=r"--host no\.such\.host\.invalid is no address"):
        listen("no.such.host.invalid", 0)


def _takes_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
    except OSError:
        return False
    return True
