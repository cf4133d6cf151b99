"""Versions by NCCL, to one worker at a time, from a process beside the learner.

A group is of two: the sender and the worker that has asked. A worker that dies meanwhile leaves an NCCL kernel on the
GPU that spins until somebody ends it, and any call of CUDA's that waits for the GPU would wait with it. So that no step
does, the sender is a process of its own, which is killed when its time is over.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from databus.codec import decode_header
from databus.helper import Helper, HelperError
from databus.transfers import SCHEMES, SLOWEST_BYTES_S, CollectiveOffer, NoTransfer, Offer
from learner.sending import Listening, Send, SendFailed, Sent
from learner.snapshot import Snapshot
from learner.staged_version import StagedVersion
from learner.transfers import NOT_STAGED

logger = logging.getLogger(__name__)

SENDING = ("-m", "learner.sending")
MAX_STARTS = 3
"""In a row that came to nothing: there is no sender to be had here."""

_decoder: "msgspec.msgpack.Decoder[Listening | Sent | SendFailed]" = msgspec.msgpack.Decoder(
    Listening | Sent | SendFailed
)


@dataclass(frozen=True)
class SendLimits:
    """start_s: until a sender listens. join_s: until the worker has come. send_s: then, until all is sent; beside what
    its bytes take."""

    start_s: float = 120.0
    join_s: float = 15.0
    send_s: float = 60.0


class CollectiveTransfers:
    """A `Transfers`."""

    scheme = SCHEMES["nccl"]

    def __init__(
        self, staged: StagedVersion, command: Sequence[str] = SENDING, limits: SendLimits = SendLimits()
    ) -> None:
        self._staged = staged
        self._command = command
        self._limits = limits
        self._helper: Helper | None = None
        self._port = 0
        self._deadline: float | None = None
        """Of what the sender is at: starting or sending; None: it waits for something to do."""
        self._count = 0
        self._starts = 0
        self._start()

    def stage(self, snapshot: Snapshot) -> None:
        self._staged.put(snapshot)

    def offer(self, version: int) -> Offer | NoTransfer:
        memory = self._staged.memory_of(version)
        if memory is None:
            return NoTransfer(version=version, reason=NOT_STAGED)
        self.tick()
        if self._helper is None:
            return NoTransfer(version=version, reason="the learner's sender does not work")
        if self._deadline is not None:
            return NoTransfer(version=version, reason="the learner's sender is busy", is_busy=True)
        self._count += 1
        name = f"{self._helper.pid}-{self._count}"
        join_s, send_s = self._limits.join_s, self._limits.send_s + memory.num_bytes / SLOWEST_BYTES_S
        try:
            self._helper.send(Send(memory=memory, name=name, join_s=join_s, send_s=send_s))
        except HelperError as error:
            self._failed(str(error))
            return NoTransfer(version=version, reason="the learner's sender has ended", is_busy=True)
        self._deadline = time.monotonic() + join_s + send_s
        return CollectiveOffer(version=version, port=self._port, name=name)

    def tick(self) -> None:
        try:
            while self._helper is not None and (answer := self._helper.poll()) is not None:
                self._take(decode_header(answer, _decoder))
        except HelperError as error:
            self._failed(str(error))
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._failed("it took too long")

    def close(self) -> None:
        if self._helper is not None:
            self._helper.kill()
        self._helper = None

    def _take(self, answer: Listening | Sent | SendFailed) -> None:
        self._deadline = None
        match answer:
            case Listening(port=port):
                self._port = port
                self._starts = 0
            case Sent():
                pass
            case SendFailed(error=error):
                logger.warning("a version was not sent: %s", error)

    def _start(self) -> None:
        self._starts += 1
        try:
            self._helper = Helper(self._command)
        except OSError as error:
            logger.warning("versions go over the bus: a sender could not be started: %s", error)
            return
        self._deadline = time.monotonic() + self._limits.start_s

    def _failed(self, why: str) -> None:
        """End the sender, and start another."""
        self.close()
        self._deadline = None
        if self._starts == MAX_STARTS:
            logger.warning("versions go over the bus from here on: no sender by NCCL has started: %s", why)
            return
        logger.warning("the sender by NCCL is started anew: %s", why)
        self._start()
