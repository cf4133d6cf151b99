"""What the weight server offers those who can take a version into a GPU's memory."""

import os
from typing import Literal, Protocol

import torch

from databus.transfers import SCHEMES, MappedOffer, NoTransfer, Offer
from learner.cuda_memory import shared
from learner.snapshot import Snapshot
from learner.staged_version import StagedVersion

NOT_STAGED = "it is not on the learner's GPU"


class Transfers(Protocol):
    """scheme: goes before the weight server's address, by which workers know. `stage` is called by whoever publishes,
    the rest by the server's thread, which it must never hold up."""

    scheme: str

    def stage(self, snapshot: Snapshot) -> None:
        """From here on this version may be taken, and no other."""
        ...

    def offer(self, version: int) -> Offer | NoTransfer: ...

    def tick(self) -> None:
        """Called several times a second."""
        ...

    def close(self) -> None:
        """End what was started. Harmless when called again."""
        ...


class MappedTransfers:
    """Workers of this machine map the version where it lies, and copy it."""

    scheme = SCHEMES["ipc"]

    def __init__(self, staged: StagedVersion) -> None:
        self._staged = staged
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()

    def stage(self, snapshot: Snapshot) -> None:
        self._staged.put(snapshot)

    def offer(self, version: int) -> Offer | NoTransfer:
        memory = self._staged.memory_of(version)
        if memory is None:
            return NoTransfer(version=version, reason=NOT_STAGED)
        return MappedOffer(version=version, memory=memory, visible=self._visible)

    def tick(self) -> None:
        pass

    def close(self) -> None:
        pass


def make_transfers(backend: Literal["nccl", "ipc"]) -> Transfers:
    """Of rank 0, from the GPU that it trains on. Raises: RuntimeError, in one line, where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"weights.backend={backend} needs an NVIDIA GPU, and the learner sees none: set it to bus")
    staged = StagedVersion(torch.device("cuda", torch.cuda.current_device()), shared)
    if backend == "ipc":
        return MappedTransfers(staged)
    from learner.collective_transfers import CollectiveTransfers

    return CollectiveTransfers(staged)
