"""A head that falls silent, as a port on which nobody listens any more."""

import socket
import time

import pytest

from echelon.launch import ray_head
from echelon.launch.ray_head import RAY_PATIENCE_VARIABLE, RayHead


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    monkeypatch.setattr(ray_head, "LOOK_EVERY_S", 0.0)
    monkeypatch.setenv(RAY_PATIENCE_VARIABLE, "0.6")
    return listen()


def listen(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=64)


def address(of: socket.socket) -> str:
    return f"127.0.0.1:{of.getsockname()[1]}"


def test_a_head_that_falls_silent_is_lost_after_half_of_what_ray_waits(listening: socket.socket) -> None:
    where = address(listening)
    head = RayHead(where)
    with listening:
        assert (head.trouble(), head.answers()) == ("", True)
    assert (head.trouble(), head.answers(), head.lost) == ("", False, False)
    time.sleep(0.4)
    assert head.trouble().startswith(f"the Ray cluster's head {where} has not answered for 0.3 s: ")
    assert head.lost


def test_a_head_that_comes_back_is_not_lost(listening: socket.socket) -> None:
    head, port = RayHead(address(listening)), listening.getsockname()[1]
    listening.close()
    assert (head.trouble(), head.answers()) == ("", False)
    time.sleep(0.2)
    with listen(port):
        assert (head.trouble(), head.answers()) == ("", True)
    time.sleep(0.2)
    assert (head.trouble(), head.lost) == ("", False)
