"""What of ours runs inside vLLM's own processes. Written against vLLM 0.32.0.

vLLM imports this module by name, in the engine-core process (the executors) and in its worker (`SnapshotLoader`).
"""

import mmap
import multiprocessing
import os
from typing import Any

import msgspec
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from databus.messages import Manifest
from databus.process import die_with_parent
from rollout.engine.tensors import first_mismatch, tensors

ROLLED_BACK = "rolled back"


def _tie_life_to_parent() -> None:
    """The engine core ends with the rollout worker, even one killed while the core was still starting."""
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


class TiedMultiprocExecutor(MultiprocExecutor):
    """vLLM's executor for the CPU, where each worker is a process of its own; it watches us through a pipe."""

    def _init_executor(self) -> None:
        _tie_life_to_parent()
        super()._init_executor()


class TiedUniProcExecutor(UniProcExecutor):
    """vLLM's executor for a single GPU: the worker lives in the engine-core process."""

    def _init_executor(self) -> None:
        _tie_life_to_parent()
        super()._init_executor()


class SnapshotLoader:
    """Mixed into vLLM's worker (`worker_extension_cls`), whose `model_runner` it uses; called by `collective_rpc`.

    vLLM calls no constructor of it, so the snapshot being served is kept in an attribute that appears with the first.
    """

    model_runner: Any

    def echelon_die_with_parent(self) -> None:
        die_with_parent()

    def echelon_apply_snapshot(self, encoded: bytes, path: str) -> str:
        """Load the snapshot that lies in the file at `path`, a memfd of the parent's under /proc.

        Args: encoded: its `Manifest` in msgpack.
        Returns: "" when it is served; else why it is not, after what was served before is served again.
        Raises: whatever stopped the rollback; the weights may then be a mixture.
        """
        manifest = msgspec.msgpack.decode(encoded, type=Manifest)
        try:
            buffer = _map(path, manifest.num_bytes)
            wrong = first_mismatch(manifest, buffer)
            if wrong:
                return f"tensor {wrong!r} does not match its checksum"
        except OSError as error:
            return f"snapshot cannot be read: {error}"
        try:
            self.model_runner.reload_weights(weights_iterator=tensors(manifest, buffer))
        except Exception as error:
            self._echelon_roll_back()
            return f"{ROLLED_BACK}: {type(error).__name__}: {error}"
        self._echelon_served = (manifest, buffer)
        return ""

    def _echelon_roll_back(self) -> None:
        """Prepacked CPU weights cannot be read back: what is served is kept as it came; at first, on disk."""
        served = getattr(self, "_echelon_served", None)
        self.model_runner.reload_weights(weights_iterator=tensors(*served) if served else None)


def _map(path: str, num_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
