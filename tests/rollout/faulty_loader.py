"""A worker extension whose loading fails as a test wants; vLLM's worker process imports it by name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rollout.engine.on_device as on_device
import rollout.engine.vllm_loading as loading
from databus.transfers import DeviceMemory
from rollout.engine.tensors import tensors
from rollout.engine.vllm_worker import SnapshotLoader


class FaultyLoader(SnapshotLoader):
    """fault: for the next load only. `raise` or `hang` when it comes to `tensor`; `spoil` it once it is loaded."""

    def stand_in_for_gpu(self) -> str:
        """Of what the version was loaded from that was applied last; "" where that was the snapshot's own. From here on
        host memory stands in for a GPU's: a handle is a path."""
        on_device.mapped = _mapped_file
        mapped = self._echelon_on_device._mapped
        return "" if mapped is None else mapped[0].handle.decode()

    def fail_next_load(self, fault: str, tensor: str, flag: str = "") -> None:
        def faulty(*source: Any) -> Iterator[tuple[str, torch.Tensor]]:
            loading.tensors = tensors
            for name, value in tensors(*source):
                if name == tensor and fault == "raise":
                    raise RuntimeError(f"no {tensor}")
                if name == tensor and fault == "hang":
                    Path(flag).touch()
                    time.sleep(60)
                yield name, value + 1 if name == tensor and fault == "spoil" else value

        loading.tensors = faulty


def _mapped_file(memory: DeviceMemory) -> torch.Tensor:
    return torch.from_file(memory.handle.decode(), shared=True, size=memory.num_bytes, dtype=torch.uint8)
