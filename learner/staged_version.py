"""The newest version on the learner's GPU, as it is served, for others to take from there."""

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from databus.transfers import DeviceMemory
from learner.snapshot import Snapshot

logger = logging.getLogger(__name__)

Share = Callable[[Tensor], DeviceMemory]


class StagedVersion:
    """One buffer, of the size of a version in the serving dtype. It is written over with the next one whoever is
    reading it: nobody is waited for, and a reader's checksums tell."""

    def __init__(self, device: torch.device, share: Share) -> None:
        """Args: share: names memory of the device for other processes."""
        self._device = device
        self._share = share
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._memory: DeviceMemory | None = None
        self._version: int | None = None
        self._lock = threading.Lock()

    def put(self, snapshot: Snapshot) -> None:
        """A version that is there in whole; of any other nothing is kept. Where there is no room the version is not
        staged, and can be had otherwise."""
        if snapshot.data is None:
            return
        with self._lock:
            self._version = None
        try:
            self._fill(torch.from_numpy(snapshot.data))
        except RuntimeError as error:  # out of memory is one
            logger.warning("version %d is not on the GPU for workers to take: %s", snapshot.manifest.version, error)
            return
        with self._lock:
            self._version = snapshot.manifest.version

    def memory_of(self, version: int) -> DeviceMemory | None:
        """Where it lies; None where another version does, or it is being written."""
        with self._lock:
            return self._memory if self._version == version else None

    def _fill(self, data: Tensor) -> None:
        if len(self._buffer) != len(data):
            self._buffer = torch.empty(len(data), dtype=torch.uint8, device=self._device)
            self._memory = self._share(self._buffer)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._buffer.copy_(data)
        if self._stream is not None:
            self._stream.synchronize()
