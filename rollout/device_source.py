"""Fetches whole versions from GPU to GPU; all else, and whatever fails, over the bus."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator

from databus.codec import Frame
from databus.keys import ClientKeys
from databus.messages import Delta, Manifest
from databus.transfers import SCHEMES, NoTransfer, Offer, split_scheme
from rollout.bus_source import BusSource, bus_source
from rollout.fetches import DeviceCopy
from rollout.receiver import Receiver, TransferError
from rollout.weight_source import PullLimits

logger = logging.getLogger(__name__)

THIS_MACHINE = "127.0.0.1"


@contextlib.contextmanager
def device_source(
    address: str, stop: threading.Event, limits: PullLimits, keys: ClientKeys | None, receiver: Receiver
) -> "Iterator[DeviceSource]":
    """As `open_source`."""
    scheme, bus_address = split_scheme(address)
    with bus_source(bus_address, stop, limits, keys) as bus:
        yield DeviceSource(bus, bus_address, stop, receiver, comes_first=scheme == SCHEMES["nccl"])


class DeviceSource:
    """A `WeightSource`."""

    def __init__(
        self, bus: BusSource, address: str, stop: threading.Event, receiver: Receiver, *, comes_first: bool
    ) -> None:
        """Args: address: of the bus. comes_first: an offer is for whoever can take it at once."""
        self.device_copy: DeviceCopy | None = None
        self._bus = bus
        self._address = address
        self._stop = stop
        self._receiver = receiver
        self._transferred_bytes = 0
        self._comes_first = comes_first
        self._only_bus = receiver.gives_up(address)

    @property
    def received_bytes(self) -> int:
        return self._bus.received_bytes + self._transferred_bytes

    def manifest(self, version: int) -> Manifest:
        return self._bus.manifest(version)

    def whole(self, manifest: Manifest) -> int:
        # An older whole version, from which deltas lead to this one, is on no GPU any more.
        if not self._only_bus and manifest.whole_version in (-1, manifest.version):
            try:
                return self._transferred(manifest)
            except TransferError as error:
                logger.warning("version %d not from GPU to GPU: %s; over the bus", manifest.version, error)
        return self._bus.whole(manifest)

    def is_private(self) -> bool:
        return True

    def chunks(self, delta: Delta) -> Iterator[Frame]:
        return self._bus.chunks(delta)

    def fall_back(self) -> bool:
        if self.device_copy is None:
            return False
        self._receiver.matched(False)
        self.device_copy = None
        self._only_bus = True
        return True

    def _transferred(self, manifest: Manifest) -> int:
        """Raises: TransferError; PullError where the learner does not answer at all."""
        if self._comes_first:
            self._receiver.start(self._stop)
        offer = self._offer(manifest.version)
        fd = os.memfd_create(f"weights-{manifest.version}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, manifest.num_bytes)
            self.device_copy = self._receiver.fetch(offer, self._host(), fd, manifest.num_bytes, self._stop)
        except BaseException:
            os.close(fd)
            raise
        self._transferred_bytes += manifest.num_bytes
        return fd

    def _host(self) -> str:
        """Where the learner is."""
        through, _, rest = self._address.partition("://")
        return rest.rpartition(":")[0] if through == "tcp" else THIS_MACHINE

    def _offer(self, version: int) -> Offer:
        """Raises: TransferError."""
        limits = self._receiver.limits
        deadline = time.monotonic() + limits.busy_s
        while isinstance(answer := self._bus.offer(version), NoTransfer):
            if not answer.is_busy or time.monotonic() > deadline:
                raise TransferError(answer.reason)
            self._stop.wait(limits.retry_s)
        return answer
