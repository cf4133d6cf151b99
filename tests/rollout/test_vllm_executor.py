"""How vLLM's processes wait for each other."""

import time

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from rollout.engine.vllm_executor import NAP_S, wait_in_naps

LOOKS = 200


def just_read() -> SpinCondition:
    """A reader's condition after a read: vLLM would look again and again, here for a minute."""
    condition = SpinCondition.__new__(SpinCondition)
    condition.is_reader, condition.last_read, condition.busy_loop_s = True, time.monotonic(), 60.0
    return condition


def test_a_reader_sleeps_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)  # put back afterwards
    wait_in_naps()
    condition = just_read()
    started, busy = time.monotonic(), time.thread_time()
    for _ in range(LOOKS):
        condition.wait()
    waited, busy = time.monotonic() - started, time.thread_time() - busy
    assert waited >= LOOKS * NAP_S
    assert busy < waited / 2


def test_a_writer_yields_by_the_same_name() -> None:
    """`acquire_write` has its loop in its own body: the name it calls is the one that is replaced."""
    assert "sched_yield" in MessageQueue.acquire_write.__wrapped__.__code__.co_names
