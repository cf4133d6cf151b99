"""Saving beside training: a step waits for a copy of the state, and a thread writes the copy."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from learner.checkpoint import write_checkpoint
from learner.checkpoint_folder import TrainerState
from learner.host_copy import HostCopy

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes checkpoints into one folder, one at a time. Every rank has one, and all call it alike."""

    def __init__(
        self, checkpoints_dir: Path, keep: int, keep_best: int = 0, *, background: bool, timeout_s: float
    ) -> None:
        """Called by all ranks of the process group. Args: background: False waits for each checkpoint at once.
        timeout_s: how long a rank waits for the others."""
        self._checkpoints_dir = checkpoints_dir
        self._keep = keep
        self._keep_best = keep_best
        self._background = background
        # Of its own: what a save says between ranks must not mix with what a step says.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy = HostCopy()
        self._writing: Future[None] | None = None

    def save(self, state: TrainerState, tensors: dict[str, Any]) -> None:
        """Begin a checkpoint, once the one before is complete; `tensors` may change when this returns.

        Raises: RuntimeError, in one line, if this one cannot be begun or the one before failed.
        """
        self.wait()
        if not self._background:
            self._write(state, tensors)
            return
        self._writing = self._thread.submit(self._write, state, self._copy.take(tensors))

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def check(self) -> None:
        """Raises: RuntimeError, in one line, if a checkpoint has failed meanwhile."""
        if not self.is_writing:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises: RuntimeError, in one line, if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for what is being written; what ends the run otherwise is the cause that counts."""
        self._thread.shutdown()
        try:
            self.wait()
        except Exception:
            logger.exception("the last checkpoint failed")

    def _write(self, state: TrainerState, tensors: dict[str, Any]) -> None:
        path = write_checkpoint(
            self._checkpoints_dir, state, tensors, self._keep, keep_best=self._keep_best, group=self._group
        )
        logger.info("checkpoint %s", path)
