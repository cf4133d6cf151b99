"""Spares, slow workers, and workers that leave: who is leased to."""

import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import RunningBroker, broker_config, connect, make_group, receive, receives_nothing, send_group

import databus.speed
from databus.client import BusClient
from databus.config import BusConfig
from databus.messages import (
    Ack,
    Credits,
    Drain,
    Heartbeat,
    Hello,
    Lease,
    Leaving,
    Released,
    Status,
    StatusRequest,
)
from databus.peers import Peer
from databus.staffing import num_regular, spares_on_duty


def peer(spare: bool, leaving: bool) -> Peer:
    one = Peer(hello=Hello(role="worker", name="w", spare=spare), route=b"", heard=0, version=0, announced=0)
    one.standing = "leaving" if leaving else "spare" if spare else "working"
    return one


@given(st.lists(st.builds(peer, st.booleans(), st.booleans()), max_size=12), st.integers(0, 12))
def test_spares_fill_the_places_of_those_who_are_missing(workers: list[Peer], wanted: int) -> None:
    needed = spares_on_duty(workers, wanted)
    free = [each.hello.spare and each.standing != "leaving" for each in workers]
    assert all(is_free for is_free, is_needed in zip(free, needed, strict=True) if is_needed)
    assert sum(needed) == max(0, min(sum(free), wanted - num_regular(workers)))
    chosen = [is_needed for is_free, is_needed in zip(free, needed, strict=True) if is_free]
    assert chosen == sorted(chosen, reverse=True), "first come, first needed"


def test_spare_works_while_a_worker_is_missing_and_no_longer(address: str) -> None:
    RunningBroker(broker_config(address, steps=100, max_staleness=8))
    worker = connect(address, "worker-0", "worker", max_sequences=4)
    spare = connect(address, "worker-1", "worker", max_sequences=4, spare=True)
    spare.send(Credits(total=1))
    assert receives_nothing(spare, Lease)
    worker.close("out of memory")
    receive(spare, Lease)
    back = connect(address, "worker-0", "worker", max_sequences=4)
    back.send(Credits(total=1))
    receive(back, Lease)
    spare.send(Credits(total=2))
    assert receives_nothing(spare, Lease)
    for client in (spare, back):
        client.close("done")


def test_leases_of_a_process_that_has_ended_go_back_soon(address: str) -> None:
    """Not after `peer_timeout_s`: on the broker's own machine the kernel can be asked."""
    bus = BusConfig(heartbeat_s=0.1, peer_timeout_s=60.0, lease_s=60.0)
    RunningBroker(broker_config(address, steps=100, bus=bus))
    ended = subprocess.Popen(["true"])
    ended.wait()
    worker = connect(address, "worker-0", "worker", max_sequences=4, pid=ended.pid, host=socket.gethostname())
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    other = connect(address, "worker-1", "worker", max_sequences=4)
    time.sleep(0.5)
    other.send(Credits(total=1))
    assert receive(other, Lease).cursor != lease.cursor, "it is heard, so it lives, whatever its pid says"
    worker.close()
    time.sleep(1.0)
    other.send(Credits(total=2))
    assert receive(other, Lease).cursor == lease.cursor
    other.close("done")


def test_worker_that_leaves_gets_nothing_more_and_hands_back(address: str) -> None:
    RunningBroker(broker_config(address, steps=100))
    first = connect(address, "first", "worker", max_sequences=8)
    first.send(Credits(total=2))
    kept, released = receive(first, Lease), receive(first, Lease)
    first.send(Leaving(reason="told to leave"))
    first.send(Released(group_ids=(released.group_id,)))
    first.send(Credits(total=4))
    assert receives_nothing(first, Lease)
    second = connect(address, "second", "worker", max_sequences=8)
    second.send(Credits(total=1))
    assert receive(second, Lease).cursor == released.cursor
    send_group(first, kept.group_id, make_group(kept.prompt_ids, [[0], [0]]))
    assert receive(first, Ack).accepted
    for client in (first, second):
        client.close("done")


def test_more_results_than_leases_change_nothing(address: str) -> None:
    """Credits bound what a worker is given; what it makes up is refused, and counts for nothing."""
    running = RunningBroker(broker_config(address, steps=100))
    worker = connect(address, "w", "worker", max_sequences=4)
    worker.send(Credits(total=1))
    lease = receive(worker, Lease)
    group = make_group(lease.prompt_ids, [[0], [0]])
    for group_id in [lease.group_id] * 50 + [f"made-up-{index}" for index in range(50)]:
        send_group(worker, group_id, group)
    accepted = [receive(worker, Ack).accepted for _ in range(100)]
    assert accepted == [True] + [False] * 99
    assert running.broker._state.ledger.completed == 1
    assert len(running.broker._state.queue) == 1
    assert receives_nothing(worker, Lease)
    worker.close("done")


class Beating:
    """A worker that reports a rate, and keeps a lease, so that it has work."""

    def __init__(self, address: str, name: str, rate: Callable[[], float]) -> None:
        self._started = time.monotonic()
        self._rate = rate
        self.client = BusClient(address, Hello(role="worker", name=name, max_sequences=4), heartbeat=self._beat)
        self.client.connect(5.0)

    def _beat(self) -> Heartbeat:
        tokens = self._rate() * (time.monotonic() - self._started)
        return Heartbeat(running_sequences=1, generated_tokens=int(tokens))


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databus.speed, "RATE_WINDOW_S", 0.3)


def status_of(observer: BusClient) -> Any:
    observer.send(StatusRequest())
    return receive(observer, Status)


def test_slow_worker_is_named_and_sent_away(address: str, short_windows: None) -> None:
    bus = BusConfig(heartbeat_s=0.05, peer_timeout_s=5.0, slow_s=1.0)
    running = RunningBroker(broker_config(address, steps=100, bus=bus))
    quick = [Beating(address, f"worker-{index}", lambda: 1000.0) for index in range(2)]
    slow = Beating(address, "worker-2", lambda: 100.0)
    drain = receive(slow.client, Drain, 10.0)
    assert "slow: " in drain.reason and "the others' median is " in drain.reason
    observer = connect(address, "o", "observer")
    status = status_of(observer)
    assert status.drained == {"worker-2": drain.reason}
    assert {worker.name: worker.standing for worker in status.workers}["worker-2"] == "leaving"
    row = running.broker._state.metrics
    assert row._num_slow == 1 and list(row._slow) == ["slow/worker-2_tokens_per_s"]
    assert all(receives_nothing(each.client, Drain, 0.2) for each in quick)
    slow.client.close(drain.reason)
    back = Beating(address, "worker-2", lambda: 1000.0)
    assert status_of(observer).drained == {}
    for each in (*(one.client for one in quick), back.client, observer):
        each.close("done")


def test_slow_one_of_two_stays(address: str, short_windows: None) -> None:
    bus = BusConfig(heartbeat_s=0.05, peer_timeout_s=5.0, slow_s=0.3)
    RunningBroker(broker_config(address, steps=100, bus=bus))
    quick, slow = Beating(address, "a", lambda: 1000.0), Beating(address, "b", lambda: 10.0)
    assert receives_nothing(slow.client, Drain, 2.0)
    for each in (quick, slow):
        each.client.close("done")
