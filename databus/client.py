"""A peer's end of the bus: a DEALER owned by a thread of its own.

The learner computes for minutes and the worker's loop may be busy, so neither can be trusted with heartbeats.
The thread does all socket work; `send` and `recv` go through queues.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import zmq

from databus.address import check_address
from databus.codec import Frame, MalformedMessage, decode_header, encode_header
from databus.errors import BusError, BusLost, BusRefused, BusTimeout
from databus.keys import ClientKeys
from databus.messages import (
    Batch,
    BatchFrames,
    BatchRequest,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Refused,
    Several,
    ToLearner,
    ToObserver,
    ToWorker,
    Welcome,
)
from databus.transport import LINGER_MS, is_ipv6, make_socket, new_route

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
HELLO_AGAIN_S = 1.0
OBSERVER_LINGER_MS = 200
NOTHING_AHEAD: tuple[int, Sequence[Frame]] = (0, ())
FROM_BROKER: dict[str, Any] = {"worker": ToWorker, "learner": ToLearner, "observer": ToObserver}


class Arrived(NamedTuple):
    """A message of the broker's and its column frames."""

    message: Any
    frames: Sequence[Frame]


def apart(several: Several, frames: Sequence[Frame]) -> Iterator[Arrived]:
    """Each message with the frames that are its own. Raises: MalformedMessage where there are more or fewer."""
    counts = several.num_frames
    if len(counts) != len(several.messages) or min(counts, default=0) < 0 or sum(counts) != len(frames):
        raise MalformedMessage(f"{len(several.messages)} messages with {counts} frames each, {len(frames)} received")
    start = 0
    for message, num_frames in zip(several.messages, counts, strict=True):
        yield Arrived(message, frames[start : start + num_frames])
        start += num_frames


class BusClient:
    """One peer's connection. `connect`, then `send` and `recv` (or `recv_async`) from any thread, then `close`."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        max_message_bytes: int = 1 << 28,
        heartbeat: Callable[[], Heartbeat] = Heartbeat,
        keys: ClientKeys | None = None,
    ) -> None:
        """Args: heartbeat: gives the counters to send; called from the bus thread. keys: None for plain text.

        Raises: ValueError.
        """
        self._address = check_address(address, encrypted=keys is not None)
        self._keys = keys
        self._hello = hello
        self._route = new_route(hello.name)
        self._max_message_bytes = max_message_bytes
        self._heartbeat = heartbeat
        self._decoder = msgspec.msgpack.Decoder(FROM_BROKER[hello.role])
        self._inbox: queue.SimpleQueue[Arrived | BusError] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[list[Frame]] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._wake_lock = threading.Lock()
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._thread = threading.Thread(target=self._work, name=f"bus-{hello.name}", daemon=True)
        self._stopping = False
        self._welcomed = False
        self._ahead: tuple[int, Sequence[Frame]] = NOTHING_AHEAD
        self._failure: BusError | None = None
        self._notify: Callable[[], object] | None = None

    def connect(self, timeout_s: float) -> Welcome:
        """Say hello. Raises: BusRefused with the broker's reason; BusTimeout if nobody answers."""
        self._thread.start()
        try:
            arrived = self.recv(timeout_s)
        except BusError:
            self.close()
            raise
        if arrived is None:
            self.close()
            unless = ", or it wants another key" if self._address.startswith("tcp://") else ""
            raise BusTimeout(f"no broker answered at {self._address} within {timeout_s:g} s{unless}")
        match arrived.message:
            case Welcome() as welcome:
                return welcome
            case Refused(reason=reason):
                self.close()
                raise BusRefused(f"the broker refused {self._hello.name}: {reason}")
        self.close()
        raise BusError(f"the broker answered hello with {type(arrived.message).__name__}")

    def send(self, message: msgspec.Struct, frames: Sequence[Frame] = ()) -> None:
        """Queue a message and its column frames. Raises: BusError where the connection has failed."""
        if self._failure is not None:
            raise self._failure
        self._outbox.put([encode_header(message), *frames])
        self._wake_up()

    def recv(self, timeout_s: float) -> Arrived | None:
        """The next message; None if none came in time. Raises: BusLost where the broker has gone silent."""
        try:
            item = self._inbox.get(timeout=max(0.0, timeout_s)) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BusError):
            self._inbox.put(item)  # so that every later call fails as well
            raise item
        return item

    async def recv_async(self) -> Arrived:
        """The next message, in an event loop; one task at a time. Raises: BusLost."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        self._notify = lambda: loop.call_soon_threadsafe(ready.set)
        while True:
            ready.clear()
            arrived = self.recv(0)
            if arrived is not None:
                return arrived
            await ready.wait()

    def close(self, goodbye: str | None = None) -> None:
        """Leave; what was sent before still goes out, as long as it takes no more than a few seconds."""
        if self._thread.is_alive():
            if goodbye is not None and self._failure is None:
                self._outbox.put([encode_header(Goodbye(reason=goodbye))])
            self._stopping = True
            self._wake_up()
            self._thread.join(CLOSE_TIMEOUT_S)
        with self._wake_lock:  # somebody may be in `send` still
            self._wake.close(linger=0)
        if not self._thread.is_alive():
            self._context.term()

    def _wake_up(self) -> None:
        with self._wake_lock, contextlib.suppress(zmq.ZMQError):
            self._wake.send(b"", zmq.DONTWAIT)

    # ------------------------------------------------------------ the bus thread

    def _work(self) -> None:
        wake = self._context.socket(zmq.PAIR)
        wake.connect("inproc://wake")
        socket = make_socket(self._context, zmq.DEALER, self._max_message_bytes, self._keys)
        socket.setsockopt(zmq.IDENTITY, self._route)
        socket.setsockopt(zmq.IPV6, is_ipv6(self._address))
        try:
            socket.connect(self._address)
            self._loop(socket, wake)
        except BusError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("the bus thread failed")
            self._fail(BusError(f"the connection to the broker failed: {error}"))
        finally:
            wake.close(linger=0)
            socket.close(linger=self._linger_ms())

    def _linger_ms(self) -> int:
        """How long what was sent last is worth waiting for: a hello that nobody took is not."""
        if not self._welcomed:
            return 0
        return OBSERVER_LINGER_MS if self._hello.role == "observer" else LINGER_MS

    def _loop(self, socket: zmq.Socket, wake: zmq.Socket) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        beat = _Beat(self._hello, self._heartbeat)
        while True:
            beat.check(socket)
            ready = dict(poller.poll(beat.wait_ms()))
            if wake in ready:
                _drain(wake)
            self._send_all(socket, beat)
            if self._stopping:
                return
            # Even if poll saw nothing: this thread may have been held up since, and what came meanwhile counts
            # before the broker is called silent.
            self._receive_all(socket, beat)

    def _send_all(self, socket: zmq.Socket, beat: "_Beat") -> None:
        if not beat.welcome and not self._stopping:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                socket.send_multipart(self._outbox.get_nowait(), copy=False)

    def _receive_all(self, socket: zmq.Socket, beat: "_Beat") -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
                beat.heard = time.monotonic()
                self._take([frame.buffer for frame in frames], beat, socket)

    def _take(self, frames: Sequence[Frame], beat: "_Beat", socket: zmq.Socket) -> None:
        try:
            message = decode_header(frames[0], self._decoder)
            together = list(apart(message, frames[1:])) if isinstance(message, Several) else []
        except MalformedMessage as error:
            logger.warning("the broker sent something malformed: %s", error)
            return
        if isinstance(message, HeartbeatReply):
            return
        if isinstance(message, Refused) and message.unknown and self._welcomed:
            beat.away()
            return
        if isinstance(message, Welcome):
            if beat.welcome is not None:
                return  # an answer to a hello that was repeated
            # Also the second time: what was sent to the broker before may be lost.
            beat.welcomed(message)
            self._welcomed = True
            self._put(Arrived(message, ()))
            self._send_all(socket, beat)
            return
        if isinstance(message, BatchFrames):
            self._ahead = (message.id, frames[1:])
        elif isinstance(message, Batch) and message.frames_id:
            self._take_batch(message, socket)
        elif isinstance(message, Several):
            for each in together:
                self._put(each)
        else:
            self._put(Arrived(message, frames[1:]))

    def _take_batch(self, batch: Batch, socket: zmq.Socket) -> None:
        """One whose frames came before: now it is as any other. If they did not come, they were on a connection that is
        gone: ask for all of it."""
        (frames_id, frames), self._ahead = self._ahead, NOTHING_AHEAD
        if frames_id == batch.frames_id:
            self._put(Arrived(msgspec.structs.replace(batch, frames_id=0), frames))
            return
        with contextlib.suppress(zmq.Again):
            socket.send(encode_header(BatchRequest(step=batch.step)), zmq.DONTWAIT)

    def _put(self, item: "Arrived | BusError") -> None:
        self._inbox.put(item)
        if self._notify is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has closed
                self._notify()

    def _fail(self, error: BusError) -> None:
        self._failure = error
        self._put(error)


class _Beat:
    """When to say hello, when to send a heartbeat, and when the broker counts as lost."""

    def __init__(self, hello: Hello, heartbeat: Callable[[], Heartbeat]) -> None:
        self.welcome: Welcome | None = None
        self.heard = time.monotonic()
        self._hello = hello
        self._heartbeat = heartbeat
        self._next = 0.0
        self._give_up: float | None = None

    def away(self) -> None:
        """The broker is not there, or not the one that knew us: say hello until it answers."""
        if self.welcome is not None:
            self._give_up = time.monotonic() + self.welcome.reconnect_s
            self.welcome, self._next = None, 0.0
            self._hello = msgspec.structs.replace(self._hello, joining=self._hello.joining + 1)

    def welcomed(self, welcome: Welcome) -> None:
        self.welcome, self._give_up = welcome, None
        self._next = 0.0  # the pause between hellos may be longer than that between heartbeats

    def check(self, socket: zmq.Socket) -> None:
        now = time.monotonic()
        if self.welcome is not None and now - self.heard > self.welcome.peer_timeout_s:
            self.away()
        if self._give_up is not None and now > self._give_up:
            raise BusLost(f"nothing heard from the broker for {now - self.heard:.1f} s")
        if now >= self._next:
            message = self._hello if self.welcome is None else self._heartbeat()
            # A socket whose key was refused has nobody to send to any more, and would wait for somebody.
            with contextlib.suppress(zmq.Again):
                socket.send(encode_header(message), zmq.DONTWAIT)
            self._next = now + (HELLO_AGAIN_S if self.welcome is None else self.welcome.heartbeat_s)

    def wait_ms(self) -> int:
        until = self._next if self._give_up is None else min(self._next, self._give_up)
        return max(1, math.ceil((until - time.monotonic()) * 1000))


def _drain(wake: zmq.Socket) -> None:
    with contextlib.suppress(zmq.Again):
        while True:
            wake.recv(zmq.DONTWAIT)
