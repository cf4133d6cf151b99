"""A worker extension whose loading fails as a test wants; vLLM's worker process imports it by name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rollout.engine.vllm_loading as loading
from rollout.engine.tensors import tensors
from rollout.engine.vllm_worker import SnapshotLoader


class FaultyLoader(SnapshotLoader):
    """fault: for the next load only. `raise` or `hang` when it comes to `tensor`; `spoil` it once it is loaded."""

    def test_next_load(self, fault: str, tensor: str, flag: str = "") -> None:
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
