"""A child that may hang: its answers have deadlines, and it never outlives whoever asks."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct

from databus.codec import decode_header
from databus.helper import Helper, HelperError

CHILD = """
import os, sys, time
from databus.helper import Channel
from databus.process import die_with_parent
die_with_parent()
channel = Channel(int(sys.argv[1]))
while order := channel._socket.recv(1 << 16):
    if b"hang" in order:
        time.sleep(60)
    if b"end" in order:
        os._exit(3)
    channel._socket.send(order)
"""
PARENT = """
import sys
from databus.helper import Helper
helper = Helper(("-c", sys.argv[1]))
print(helper.pid, flush=True)
sys.stdin.read()
"""


class Say(Struct, frozen=True, tag=True):
    text: str


decoder = msgspec.msgpack.Decoder(Say)


@contextmanager
def child() -> Iterator[Helper]:
    helper = Helper(("-c", CHILD))
    try:
        yield helper
    finally:
        helper.kill()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_it_answers_one_message_at_a_time() -> None:
    with child() as helper:
        assert helper.poll() is None
        for text in ("one", "two", "x" * 20_000):
            helper.send(Say(text))
            assert decode_header(helper.receive(20.0), decoder) == Say(text)
    assert is_gone(helper.pid)


def test_it_outlives_the_thread_that_asked_for_it() -> None:
    made: list[Helper] = []
    thread = threading.Thread(target=lambda: made.append(Helper(("-c", CHILD))))
    thread.start()
    thread.join()
    (helper,) = made
    try:
        helper.send(Say("one"))
        assert decode_header(helper.receive(20.0), decoder) == Say("one")
    finally:
        helper.kill()


def test_one_that_hangs_is_killed() -> None:
    with child() as helper:
        helper.send(Say("hang"))
        began = time.monotonic()
        with pytest.raises(HelperError, match=r"did not answer within 1 s"):
            helper.receive(1.0)
        assert time.monotonic() - began < 5.0
        assert is_gone(helper.pid)
        with pytest.raises(HelperError):
            helper.send(Say("more"))


def test_one_that_ends_is_noticed() -> None:
    with child() as helper:
        helper.send(Say("end"))
        with pytest.raises(HelperError, match="has ended"):
            helper.receive(20.0)


def test_waiting_is_given_up() -> None:
    with child() as helper:
        helper.send(Say("hang"))
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(HelperError, match="given up"):
            helper.receive(50.0, stop)
        assert is_gone(helper.pid)


def test_it_ends_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    deadline = time.monotonic() + 10.0
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)
