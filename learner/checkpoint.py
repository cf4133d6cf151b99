"""Saving and loading the learner's state: fp32 masters and optimizer moments, as a distributed checkpoint (DCP).

Any number of ranks can read what any number wrote. Only tensors are stored: learning rates follow from the
configuration and the step.
"""

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from learner.checkpoint_folder import (
    TrainerState,
    checkpoint_path,
    finish_checkpoint,
    read_trainer_state,
    start_checkpoint,
    temporary_path,
    verify_files,
)


def save_checkpoint(
    checkpoints_dir: Path, state: TrainerState, causal_lm: nn.Module, optimizer: Optimizer, keep: int
) -> Path:
    """Write the checkpoint of `state.step` and delete all but the newest `keep`; called by all ranks.

    Returns: its folder. Raises: RuntimeError, in one line, where the disk refuses.
    """
    first_rank = dist.get_rank() == 0
    try:
        if first_rank:
            start_checkpoint(checkpoints_dir, state.step)
        dist.barrier()
        save(_tensors(causal_lm, optimizer), checkpoint_id=temporary_path(checkpoints_dir, state.step))
        if first_rank:
            finish_checkpoint(checkpoints_dir, state, keep)
        dist.barrier()
    except (CheckpointException, OSError) as error:
        raise RuntimeError(f"checkpoint of step {state.step} could not be written: {_first_line(error)}") from None
    return checkpoint_path(checkpoints_dir, state.step)


def load_checkpoint(checkpoint: Path, causal_lm: nn.Module, optimizer: Optimizer) -> TrainerState:
    """Fill model and optimizer from a checkpoint; called by all ranks.

    Raises: ValueError, in one line, for a missing, damaged or foreign checkpoint.
    """
    state = read_trainer_state(checkpoint)
    verify_files(checkpoint, state)
    tensors = _tensors(causal_lm, optimizer)
    load_tensors(checkpoint, tensors)  # in place: the model's own tensors
    moments = get_optimizer_state_dict(causal_lm, optimizer)
    moments["state"] = tensors["optimizer"]
    set_optimizer_state_dict(causal_lm, optimizer, moments)
    return state


def load_tensors(checkpoint: Path, tensors: dict[str, Any], no_dist: bool = False) -> None:
    """Fill nested dictionaries of tensors in place.

    Args: no_dist: one process reads everything, without a process group.
    Raises: ValueError, in one line.
    """
    try:
        with warnings.catch_warnings():
            # DCP warns that there is one process only, which is what was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"checkpoint {checkpoint} is of another model, or damaged: {_first_line(error)}") from None


def model_tensors(causal_lm: nn.Module) -> dict[str, Any]:
    """Masters and persistent buffers by their transformers name; tied weights once. Sharded where the model is."""
    # named_parameters names a shared parameter once, under its first name.
    named = dict(causal_lm.named_parameters()) | dict(causal_lm.named_buffers())
    return {name: value for name, value in get_model_state_dict(causal_lm).items() if name in named}


def _tensors(causal_lm: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    moments = get_optimizer_state_dict(causal_lm, optimizer)["state"]
    return {"model": model_tensors(causal_lm), "optimizer": moments}


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".split("\n")[0]
