"""Takes versions from GPU to GPU, in a process beside the worker: one that hangs is killed, and the version comes over
the bus. The engine shares no CUDA context with it."""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from databus.codec import MalformedMessage, decode_header
from databus.helper import Helper, HelperError
from databus.transfers import SLOWEST_BYTES_S, MappedOffer, Offer
from rollout.fetches import DeviceCopy, Fetch, Fetched, FetchFailed, Ready

logger = logging.getLogger(__name__)

RECEIVING = ("-m", "rollout.receiving")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_FAILURES = 3

_decoder: "msgspec.msgpack.Decoder[Ready | Fetched | FetchFailed]" = msgspec.msgpack.Decoder(
    Ready | Fetched | FetchFailed
)


class TransferError(Exception):
    """A version did not come this way; there is another. One line for a person."""


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """start_s: until a receiver is up. fetch_s: for a version, beside what its bytes take. busy_s: that the learner may
    be busy with others. retry_s: until it is asked again."""

    start_s: float = 60.0
    fetch_s: float = 60.0
    busy_s: float = 20.0
    retry_s: float = 0.1


class Receiver:
    """One thread at a time. Three failures in a row from one learner: it is not tried again with that one."""

    def __init__(
        self,
        command: Sequence[str] = RECEIVING,
        limits: FetchLimits = FetchLimits(),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Args: command, environment: of the process, beyond this one's."""
        self.limits = limits
        self._own = environment or {}
        self._command = command
        self._helper: Helper | None = None
        self._environment: Mapping[str, str] = {}
        self._learner = ""
        self._failures = 0

    def gives_up(self, learner: str) -> bool:
        """Args: learner: its address."""
        if learner != self._learner:
            self._learner, self._failures = learner, 0
        if self._failures == MAX_FAILURES:
            logger.warning("versions of this learner come over the bus from here on: %d transfers failed", MAX_FAILURES)
            self._failures += 1
        return self._failures > MAX_FAILURES

    def start(self, stop: threading.Event, visible: str = "") -> None:
        """Wait until it is up, where it is not. Args: stop: once set, nobody waits any more. visible: of the GPU that
        it must see beside its own; as `seeing`.

        Raises: TransferError.
        """
        environment = {**self._own, **seeing(visible, self._own.get(VISIBLE, os.environ.get(VISIBLE, "")))}
        if self._helper is not None and environment == self._environment:
            return
        self.close()
        self._environment = environment
        try:
            self._helper = Helper(self._command, environment)
        except OSError as error:
            raise self._failed(str(error)) from None
        self._answer(self.limits.start_s, stop)

    def fetch(self, offer: Offer, host: str, fd: int, num_bytes: int, stop: threading.Event) -> DeviceCopy:
        """Args: fd: of the host's memory that it is copied to. stop: as of `start`.

        Raises: TransferError.
        """
        within_s = self.limits.fetch_s + num_bytes / SLOWEST_BYTES_S
        order = Fetch(
            offer=offer,
            host=host,
            path=f"/proc/{os.getpid()}/fd/{fd}",
            num_bytes=num_bytes,
            timeout_s=within_s,
        )
        self.start(stop, offer.visible if isinstance(offer, MappedOffer) else "")
        assert self._helper is not None
        try:
            self._helper.send(order)
        except HelperError as error:
            raise self._failed(str(error)) from None
        answer = self._answer(within_s, stop)
        if not isinstance(answer, Fetched):
            raise self._failed("the receiver said something else")
        return answer.copy

    def matched(self, is_right: bool) -> None:
        """Of what was fetched last: is it what was published?"""
        self._failures = 0 if is_right else self._failures + 1

    def close(self) -> None:
        """Harmless when called again."""
        if self._helper is not None:
            self._helper.kill()
        self._helper = None

    def _answer(self, within_s: float, stop: threading.Event) -> Ready | Fetched:
        assert self._helper is not None
        try:
            answer = decode_header(self._helper.receive(within_s, stop), _decoder)
        except (HelperError, MalformedMessage) as error:
            raise self._failed(str(error)) from None
        if isinstance(answer, FetchFailed):
            raise self._failed(answer.error)
        return answer

    def _failed(self, why: str) -> TransferError:
        self.close()
        self._failures += 1
        return TransferError(why)


def seeing(gpu: str, visible: str) -> dict[str, str]:
    """What lets a process see the learner's GPU beside those that it would see, which come first.

    Args: gpu: as CUDA_VISIBLE_DEVICES calls it; "" where it would be seen. visible: that variable.
    """
    own = [name.strip() for name in visible.split(",") if name.strip()]
    return {VISIBLE: ",".join([*own, gpu])} if own and gpu and gpu not in own else {}
