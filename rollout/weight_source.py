"""Where a worker fetches versions from: the bus, files, memory, or a GPU, by the address that was announced.

PullError
├── VersionGoneError   the learner keeps that version no longer; a newer one will be announced
└── DamagedError       what came is not what was published
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from databus.codec import Frame
from databus.keys import ClientKeys
from databus.messages import Delta, Manifest
from databus.transfers import split_scheme
from rollout.fetches import DeviceCopy
from rollout.receiver import Receiver


class PullError(Exception):
    """A version could not be pulled; one line for a person."""


class VersionGoneError(PullError):
    """The server has dropped the version (or does not have it yet)."""


class DamagedError(PullError):
    """A checksum or a size does not match, or bytes make no sense."""


@dataclass(frozen=True, kw_only=True)
class PullLimits:
    """resend_s: an answer that has not come by then is asked for again. silence_s: without any, the pull fails."""

    resend_s: float = 5.0
    silence_s: float = 60.0


class WeightSource(Protocol):
    """For one pull. All raise PullError and what lies below it, MalformedMessage for what makes no sense.

    device_copy: of what `whole` gave last; None where it came without one.
    """

    @property
    def received_bytes(self) -> int: ...

    @property
    def device_copy(self) -> DeviceCopy | None: ...

    def manifest(self, version: int) -> Manifest: ...

    def whole(self, manifest: Manifest) -> int:
        """A descriptor, the caller's, of the flat buffer of `manifest.whole_version`, in memory; not checked yet."""
        ...

    def is_private(self) -> bool:
        """May what `whole` gives be written to?"""
        ...

    def chunks(self, delta: Delta) -> Iterator[Frame]:
        """All of them, in any order."""
        ...

    def fall_back(self) -> bool:
        """What `whole` gave is not what was published: is there another way, by which it will give it next?"""
        ...


def open_source(
    address: str, stop: threading.Event, limits: PullLimits, keys: ClientKeys | None, receiver: Receiver
) -> AbstractContextManager[WeightSource]:
    """Args: address: as the learner's outlet has it. stop: once set, waiting ends within a moment. keys: of a socket;
    None for plain text. receiver: used where the learner offers versions on its GPU.

    Raises: ValueError for an address that may not be used.
    """
    if address.startswith("file://"):
        from rollout.files_source import files_source

        return files_source(address, stop)
    if address.startswith("shm://"):
        from rollout.memory_source import memory_source

        return memory_source(address, stop)
    if split_scheme(address)[0]:
        from rollout.device_source import device_source

        return device_source(address, stop, limits, keys, receiver)
    from rollout.bus_source import bus_source

    return bus_source(address, stop, limits, keys)
