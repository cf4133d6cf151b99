"""How vLLM's processes wait for each other."""

import time

import pytest

pytest.importorskip("vllm")

from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from rollout.engine import vllm_executor
from rollout.engine.vllm_executor import LATE, LONGEST_NAP_S, NAP_S, Naps, wait_in_naps

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


def test_naps_grow_with_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, naps = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(vllm_executor.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(vllm_executor.time, "sleep", sleep)
    nap = Naps()
    for _ in range(60):
        nap()
    assert naps[0] == NAP_S and naps == sorted(naps) and naps[-1] == LONGEST_NAP_S
    for before, length in enumerate(naps):
        assert length <= NAP_S + LATE * sum(naps[:before]) + 1e-9
    clock[0] += 0.01  # work
    nap()
    assert naps[-1] == NAP_S


def test_a_writer_yields_by_the_same_name() -> None:
    """`acquire_write` has its loop in its own body: the name it calls is the one that is replaced."""
    assert "sched_yield" in MessageQueue.acquire_write.__wrapped__.__code__.co_names
