"""Where a learner puts its versions for the workers to fetch: over the bus, in files, in memory, or on its GPU."""

from pathlib import Path
from typing import Protocol

from databus.config import WeightsConfig
from databus.keys import ServerKeys
from learner.snapshot import Snapshot


class Outlet(Protocol):
    """address: what workers are told. keeps_data: snapshots' data is used after `publish`, and must not change."""

    address: str
    keeps_data: bool

    def publish(self, snapshot: Snapshot) -> None:
        """It can be had from now on; what nobody needs any more goes. Raises: RuntimeError where there is no room."""
        ...

    def close(self) -> None:
        """Stop, and remove what was made. Harmless when called again."""
        ...


def make_outlet(
    config: WeightsConfig, bus_address: str, keep: int, keys: ServerKeys | None, folder: Path | None
) -> Outlet:
    """Args: keep: newest versions that can be had. keys: of a socket; None for plain text. folder: of files, which this
    run has for itself.

    Raises: zmq.ZMQError, OSError or RuntimeError where that cannot be.
    """
    match config.backend:
        case "bus":
            from learner.weights_out import WeightServer

            return WeightServer(bus_address, keep, keys)
        case "nccl" | "ipc":
            from learner.transfers import make_transfers
            from learner.weights_out import WeightServer

            return WeightServer(bus_address, keep, keys, make_transfers(config.backend))
        case "file":
            from learner.files_out import FilesOut

            assert folder is not None
            return FilesOut(folder, keep)
        case "shm":
            from learner.memory_out import MemoryOut

            assert folder is not None
            return MemoryOut(folder, keep)
