"""Copies of the learner's state in shared memory: where a learner that was killed goes on, while its machine lives."""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from learner.checkpoint_folder import TrainerState, latest_checkpoint, read_trainer_state, step_of, verify_files
from learner.checkpoint_saver import CheckpointSaver

logger = logging.getLogger(__name__)

SETTING = "learner.memory_copy_every"


def restart_point(checkpoints_dir: Path, memory_dir: Path | None) -> Path | None:
    """The newest state there is: a whole copy in memory, else the newest checkpoint; None for the initial model."""
    checkpoint = latest_checkpoint(checkpoints_dir)
    in_memory = None if memory_dir is None else latest_checkpoint(memory_dir)
    if in_memory is None or (checkpoint is not None and step_of(checkpoint) >= step_of(in_memory)):
        return checkpoint
    try:
        verify_files(in_memory, read_trainer_state(in_memory))
    except ValueError as error:
        logger.warning("going on from the disk: %s", error)
        return checkpoint
    logger.info("going on from the copy in memory after %d steps", step_of(in_memory))
    return in_memory


class MemoryCopies:
    """Keeps the newest copy; one that fails is missed by nobody as long as the learner lives."""

    def __init__(self, folder: Path, saver: CheckpointSaver, every: int, start_step: int) -> None:
        """Args: saver: into `folder`. start_step: there is a copy of that already, or a checkpoint, or the model."""
        self._folder = folder
        self._saver = saver
        self._every = every
        self._start_step = start_step
        self._has_room = False

    def due(self, step: int) -> bool:
        return step > self._start_step and step % self._every == 0

    def save(self, state: TrainerState, tensors: dict[str, Any]) -> None:
        """As `CheckpointSaver.save`, but only warns. Raises: ValueError where there is no room to begin with."""
        if not self._has_room:
            check_room(self._folder, tensors)
            self._has_room = True
        try:
            self._saver.save(state, tensors)
        except RuntimeError as error:
            logger.warning("a copy in memory is missing: %s", error)


def check_room(folder: Path, tensors: dict[str, Any]) -> None:
    """Room for two copies: one is whole while the next is written. Raises: ValueError, in one line."""
    needed, free = 2 * num_bytes(tensors), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{SETTING} needs {needed:,} bytes in {folder.parent}, which has {free:,} free: give it more room, or set "
            f"{SETTING}=0"
        )


def num_bytes(tensors: Any) -> int:
    """Of nested dictionaries of tensors, over all ranks."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(num_bytes(each) for each in tensors.values()) if isinstance(tensors, dict) else 0
