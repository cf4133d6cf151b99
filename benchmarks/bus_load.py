"""Lean peers for `bench_bus`: a worker that answers every lease at once, and a learner that trains nothing.

They speak the real protocol over sockets of the bus, and do as little as they can beside: what is measured is the
broker. Both live in one thread of one process.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import zmq

from databus.codec import decode_header, encode_header
from databus.groups import Group, encode_group
from databus.messages import (
    Batch,
    BatchFrames,
    BatchRequest,
    Completed,
    Credits,
    Goodbye,
    Hello,
    Lease,
    Role,
    Several,
    StepDone,
    Stop,
    ToLearner,
    ToWorker,
    VersionAnnounced,
    VersionApplied,
    VersionPublished,
    Welcome,
)

PROMPT_IDS = (1, 2, 3, 4, 5, 6, 7, 8)
MAX_MESSAGE_BYTES = 1 << 28
PATIENCE_S = 60.0

Connect = Callable[[Role], zmq.Socket]
"""From a role (`worker`, `learner`) to a DEALER that is connected to the broker."""


def make_group(size: int, tokens: int, version: int = 0) -> Group:
    """`size` completions of `tokens` tokens, all sampled by one version: 9 bytes a token."""
    random = np.random.default_rng(0)
    total = size * tokens
    return Group(
        prompt_ids=np.array(PROMPT_IDS, np.int32),
        lengths=np.full(size, tokens, np.int32),
        token_ids=random.integers(0, 150_000, total, dtype=np.int32),
        logprobs=-random.random(total, dtype=np.float32),
        loss_mask=np.ones(total, np.uint8),
        version_values=np.array([version], np.int32),
        version_lengths=np.array([total], np.int32),
        rewards=random.random(size, dtype=np.float32),
        reward_parts=random.random((size, 1), dtype=np.float32),
        truncated=np.zeros(size, np.uint8),
    )


@dataclass(frozen=True)
class Load:
    """What is asked of the broker. warm_up: steps before the clock starts."""

    group_size: int
    tokens: int
    steps: int
    warm_up: int
    credit: int

    @property
    def measured_steps(self) -> int:
        return self.steps - self.warm_up


class LeanWorker:
    """Answers with the same tokens every time, as of the version that it was told of last."""

    def __init__(self, socket: zmq.Socket, load: Load) -> None:
        self._socket = socket
        self._group = make_group(load.group_size, load.tokens)
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._credits = self._granted = load.credit
        self._serve(0)
        self._socket.send(encode_header(Hello(role="worker", name="worker-0", max_sequences=1)))
        self.has_ended = False

    def _serve(self, version: int) -> None:
        group = replace(self._group, version_values=np.array([version], np.int32))
        self._columns, frames = encode_group(group)
        self._frames = [zmq.Frame(frame, copy=False) for frame in frames]

    def take(self, frames: Sequence[zmq.Frame]) -> None:
        message = decode_header(frames[0].buffer, self._decoder)
        for each in message.messages if isinstance(message, Several) else (message,):
            self._answer(each)
        if self._credits > self._granted:
            self._granted = self._credits
            self._socket.send(encode_header(Credits(total=self._credits)))

    def _answer(self, message: msgspec.Struct) -> None:
        match message:
            case Lease(group_id=group_id):
                completed = Completed(group_id=group_id, columns=self._columns, reward_names=("reward",))
                self._socket.send_multipart([encode_header(completed), *self._frames], copy=False)
                self._credits += 1
            case VersionAnnounced(version=version):
                self._serve(version)
                self._socket.send(encode_header(VersionApplied(version=version)))
            case Welcome():
                self._socket.send(encode_header(Credits(total=self._credits)))
            case Stop():
                self._socket.send(encode_header(Goodbye()))
                self.has_ended = True


class LeanLearner:
    """Asks for batch after batch; remembers when each came."""

    def __init__(self, socket: zmq.Socket, address: str) -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(ToLearner)
        self._address = address
        self._socket.send(encode_header(Hello(role="learner", name="learner")))
        self.batch_times: list[float] = []
        self.batch_bytes = 0
        self._frames_id = 0
        self.has_ended = False

    def take(self, frames: Sequence[zmq.Frame]) -> None:
        match decode_header(frames[0].buffer, self._decoder):
            case BatchFrames(id=frames_id):
                self._frames_id = frames_id
                self.batch_bytes += sum(len(frame) for frame in frames)
            case Batch(step=step, frames_id=frames_id):
                if frames_id != self._frames_id:
                    raise RuntimeError(f"batch {step} came without its frames")
                self.batch_times.append(time.perf_counter())
                self._publish(step + 1)
                self._send(StepDone(step=step, metrics={}))
                self._send(BatchRequest(step=step + 1))
            case Welcome():
                self._publish(0)
                self._send(BatchRequest(step=0))
            case Stop():
                self._send(Goodbye())
                self.has_ended = True

    def _publish(self, version: int) -> None:
        self._send(VersionPublished(version=version, address=self._address, num_bytes=0))

    def _send(self, message: msgspec.Struct) -> None:
        self._socket.send(encode_header(message))


def run_load(load: Load, connect: Connect, each_batch: Callable[[int], object] = lambda step: None) -> LeanLearner:
    """Both peers until the broker says stop. Raises: TimeoutError where it says nothing for a minute."""
    worker_socket, learner_socket = connect("worker"), connect("learner")
    worker, learner = LeanWorker(worker_socket, load), LeanLearner(learner_socket, "tcp://127.0.0.1:1")
    peers = {worker_socket: worker, learner_socket: learner}
    poller = zmq.Poller()
    for socket in peers:
        poller.register(socket, zmq.POLLIN)
    while not (worker.has_ended and learner.has_ended):
        ready = poller.poll(int(PATIENCE_S * 1000))
        if not ready:
            raise TimeoutError(f"the broker has said nothing for {PATIENCE_S:g} s")
        for socket, _ in ready:
            before = len(learner.batch_times)
            peers[socket].take(socket.recv_multipart(copy=False))
            if len(learner.batch_times) > before:
                each_batch(before)
    for socket in peers:
        socket.close(linger=2000)
    return learner
