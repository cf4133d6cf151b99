"""A whole worker process over real sockets: the small engine, the scoring pool, a scripted broker and weight server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from databus.codec import Frame, encode_header
from databus.groups import Group, decode_group
from databus.messages import (
    Ack,
    Chunk,
    Completed,
    Credits,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Lease,
    Leaving,
    ManifestRequest,
    Released,
    Sampling,
    Stop,
    ToWeightServer,
    VersionAnnounced,
    VersionApplied,
    Welcome,
)
from databus.transport import BrokerSocket
from rollout.engine.base import Snapshot

SCRIPT = """
import asyncio, sys
from pathlib import Path
from databus.client import BusClient
from databus.messages import Hello
from databus.process import die_with_parent
from rewards.config import RewardConfig
from rollout.config import RolloutConfig
from rollout.run import WorkerRun, run_worker

def make_client(version, heartbeat):
    hello = Hello(role="worker", name="worker-0", run_id="r", version=version, max_sequences=8)
    return BusClient(sys.argv[2], hello, heartbeat=heartbeat)

if __name__ == "__main__":
    die_with_parent()
    asyncio.run(run_worker(
        RolloutConfig(engine="small", context_tokens=4000, max_sequences=8, drain_s=8.0),
        RewardConfig(function="mine.py:reward", processes=2, timeout_s=100),
        WorkerRun(model=sys.argv[1], seed=0, group_size=4, reward_dir=Path(sys.argv[3])),
        make_client,
    ))
"""
REWARD = """
import time
def reward(sample):
    time.sleep(sample.problem.get("takes_s", 0))
    return {"length": sample.num_tokens, "text": sample.completion.count("1") / 8}
"""
PROMPT = (6, 13, 8, 14)


class Broker:
    """Answers hello and heartbeats, and keeps what a worker says."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/bus"
        self._socket = BrokerSocket(self.address, 1 << 24)
        self.received: list[tuple[Any, list[Frame]]] = []

    def say(self, message: Any) -> None:
        assert self._socket.send("worker-0", message)

    def wait(self, kind: type, count: int = 1, timeout_s: float = 40.0) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        while len(self.all(kind)) < count:
            assert time.monotonic() < deadline, f"no {kind.__name__}; got {[type(each) for each, _ in self.received]}"
            self._take(0.05)
        return self.all(kind)

    def all(self, kind: type) -> list[Any]:
        return [message for message, _ in self.received if isinstance(message, kind)]

    def group(self, index: int) -> Group:
        message, frames = [pair for pair in self.received if isinstance(pair[0], Completed)][index]
        return decode_group(message.columns, frames)

    def _take(self, timeout_s: float) -> None:
        received = self._socket.receive(timeout_s)
        if received is None:
            return
        self.received.append((received.message, list(received.frames)))
        match received.message:
            case Hello():
                self.say(Welcome(run_id="r", heartbeat_s=0.1, peer_timeout_s=5.0))
            case Heartbeat():
                self._socket.send("worker-0", HeartbeatReply(version=0))  # to one who may have left
            case Completed(group_id=group_id):
                self.say(Ack(group_id=group_id, accepted=True))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    yield broker
    broker.close()


@contextmanager
def worker(model: Path, broker: Broker, folder: Path) -> Iterator[subprocess.Popen]:
    (folder / "mine.py").write_text(REWARD)
    (folder / "worker.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(folder / "worker.py"), str(model), broker.address, str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def weight_server(snapshot: Snapshot, folder: Path) -> Iterator[str]:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{folder}/weights")
    decoder = msgspec.msgpack.Decoder(ToWeightServer)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if router.poll(20):
                peer, data = router.recv_multipart()
                router.send_multipart([peer, *answer(decoder.decode(data))])

    def answer(request: ToWeightServer) -> Sequence[bytes]:
        size = snapshot.manifest.chunk_bytes
        if isinstance(request, ManifestRequest):
            return [encode_header(snapshot.manifest)]
        data = os.pread(
            snapshot.fd, min(size, snapshot.manifest.num_bytes - request.index * size), request.index * size
        )
        return [encode_header(Chunk(version=request.version, index=request.index)), data]

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"ipc://{folder}/weights"
    finally:
        stop.set()
        thread.join()
        context.destroy(linger=0)


def lease(group_id: str, tokens: int = 30, **changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "group_id": group_id,
        "cursor": 0,
        "attempt": 0,
        "purpose": "train",
        "prompt": "3+5=",
        "prompt_ids": PROMPT,
        "problem": json.dumps({}).encode(),
        "group_size": 4,
        "sampling": Sampling(max_tokens=tokens),
        "lease_s": 60.0,
    }
    return Lease(**(fields | changes))


def test_a_worker_from_hello_to_goodbye(
    tiny_model: Path,
    tmp_path: Path,
    broker: Broker,
    other_weights: Callable,
    make_snapshot: Callable,
    reference: Callable,
) -> None:
    new = other_weights(1)
    snapshot = make_snapshot(new, 1)
    with worker(tiny_model, broker, tmp_path) as process, weight_server(snapshot, tmp_path) as address:
        (hello,) = broker.wait(Hello)
        assert (hello.version, hello.max_sequences) == (0, 8)
        assert broker.wait(Credits)[0].total == 4, "two groups that run, and as many ahead"
        broker.say(lease("a"))
        (completed,) = broker.wait(Completed)
        assert completed.reward_names == ("length", "text")
        group = broker.group(0)
        assert group.token_versions().tolist() == [0] * group.num_tokens
        assert group.reward_parts[:, 0].tolist() == group.lengths.tolist()
        np.testing.assert_allclose(group.rewards, group.reward_parts.sum(1), rtol=1e-6)

        broker.say(VersionAnnounced(version=1, address=address, num_bytes=snapshot.manifest.num_bytes))
        (applied,) = broker.wait(VersionApplied)
        assert (applied.version, applied.received_bytes) == (1, snapshot.manifest.num_bytes)
        broker.say(lease("eval-1", purpose="eval", group_size=1, sampling=Sampling(max_tokens=30, temperature=0.0)))
        broker.wait(Completed, 2)
        answer = broker.group(1)
        assert set(answer.token_versions().tolist()) == {1}
        expected = reference(new, PROMPT, answer, 0.0)
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-5)
        wait_until_it_generates(broker)

        broker.say(Stop(reason="all steps are done"))
        assert broker.wait(Goodbye)[0].reason == "all steps are done"
        assert process.wait(20) == 0


def test_sigterm_finishes_what_it_can_and_gives_the_rest_back(tiny_model: Path, tmp_path: Path, broker: Broker) -> None:
    with worker(tiny_model, broker, tmp_path) as process:
        broker.wait(Credits)
        broker.say(lease("short", problem=json.dumps({"takes_s": 1}).encode()))
        broker.wait(Credits, 2)  # so it is the first to be scored
        broker.say(lease("stuck", problem=json.dumps({"takes_s": 1000}).encode()))
        broker.wait(Credits, 3)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert broker.wait(Leaving)[0].reason == "told to leave"
        assert broker.wait(Released)[0].group_ids == ("stuck",)
        assert [each.group_id for each in broker.all(Completed)] == ["short"]
        assert broker.wait(Goodbye)[0].reason == "told to leave"
        assert process.wait(20) == 0
        assert not psutil.wait_procs(children, timeout=10)[1]


def test_sigint_gives_leases_back_at_once(tiny_model: Path, tmp_path: Path, broker: Broker) -> None:
    with worker(tiny_model, broker, tmp_path) as process:
        broker.wait(Credits)
        broker.say(lease("endless", tokens=3900, group_size=64))
        wait_until_it_generates(broker)
        process.send_signal(signal.SIGINT)
        assert broker.wait(Released)[0].group_ids == ("endless",)
        assert broker.wait(Goodbye)[0].reason == "told to stop"
        assert not broker.all(Leaving)
        assert process.wait(20) == 0


def wait_until_it_generates(broker: Broker) -> None:
    while not any(beat.generated_tokens for beat in broker.all(Heartbeat)):
        broker.wait(Heartbeat, len(broker.all(Heartbeat)) + 1)
