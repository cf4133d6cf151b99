"""Saving and loading the learner's state: fp32 masters and optimizer moments, as a distributed checkpoint (DCP).

Any number of ranks can read what any number wrote. Only tensors are stored: learning rates follow from the
configuration and the step.
"""

import warnings
from collections.abc import Callable
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

from learner.checkpoint_contents import check_contents
from learner.checkpoint_folder import (
    DamagedCheckpoint,
    TrainerState,
    checkpoint_path,
    finish_checkpoint,
    read_trainer_state,
    start_checkpoint,
    temporary_path,
    verify_files,
)


def write_checkpoint(
    checkpoints_dir: Path,
    state: TrainerState,
    tensors: dict[str, Any],
    keep: int,
    *,
    keep_best: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of `state.step`, durably, then delete older ones; called by all ranks, with their shards.

    Args: tensors: as `state_tensors` makes them. keep, keep_best: newest ones and best ones that stay. group: of all
        ranks, on CPU; None for the one that training uses.
    Returns: its folder. Raises: RuntimeError, in one line, on all ranks, where the disk refuses.
    """
    try:
        _on_first_rank(lambda: start_checkpoint(checkpoints_dir, state.step), group)
        save(tensors, checkpoint_id=temporary_path(checkpoints_dir, state.step), process_group=group)
        _on_first_rank(lambda: finish_checkpoint(checkpoints_dir, state, keep, keep_best), group)
    except (CheckpointException, OSError) as error:
        raise RuntimeError(
            f"checkpoint of step {state.step} could not be written to {checkpoints_dir}: {_first_line(error)}"
        ) from None
    return checkpoint_path(checkpoints_dir, state.step)


def load_checkpoint(checkpoint: Path, causal_lm: nn.Module, optimizer: Optimizer) -> TrainerState:
    """Fill model and optimizer from a checkpoint; called by all ranks.

    Raises: ValueError, in one line, on all ranks, for a missing, damaged or foreign one, before any tensor changes.
    """
    state = read_trainer_state(checkpoint)
    _verify_together(checkpoint, state)
    tensors = state_tensors(causal_lm, optimizer)
    load_tensors(checkpoint, tensors)  # in place: the model's own tensors
    moments = get_optimizer_state_dict(causal_lm, optimizer)
    moments["state"] = tensors["optimizer"]
    set_optimizer_state_dict(causal_lm, optimizer, moments)
    return state


def load_tensors(checkpoint: Path, tensors: dict[str, Any], no_dist: bool = False) -> None:
    """Fill nested dictionaries of tensors in place; they are all that the checkpoint has under their first names.

    Args: no_dist: one process reads everything, without a process group.
    Raises: ValueError, in one line.
    """
    check_contents(checkpoint, tensors)
    try:
        with warnings.catch_warnings():
            # DCP warns that there is one process only, which is what was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {_first_line(error)}") from None


def state_tensors(causal_lm: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint holds: the live tensors, under `model` and `optimizer`."""
    moments = get_optimizer_state_dict(causal_lm, optimizer)["state"]
    return {"model": model_tensors(causal_lm), "optimizer": moments}


def model_tensors(causal_lm: nn.Module) -> dict[str, Any]:
    """Masters and persistent buffers by their transformers name; tied weights once. Sharded where the model is.

    Frozen parameters, beside adapters, are those of the model's folder, and are left out."""
    # named_parameters names a shared parameter once, under its first name.
    trained = {name: parameter for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    named = trained | dict(causal_lm.named_buffers())
    return {name: value for name, value in get_model_state_dict(causal_lm).items() if name in named}


def _on_first_rank(action: Callable[[], object], group: dist.ProcessGroup | None) -> None:
    """Others wait for it, and fail with it. Raises: OSError on all ranks."""
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failed = [str(error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(failed, src=0, group=group)
    if failed[0] is not None:
        raise OSError(failed[0])


def _verify_together(checkpoint: Path, state: TrainerState) -> None:
    """Each rank reads its share of the files. Raises: ValueError on all ranks."""
    world_size = dist.get_world_size()
    own: str | None = None
    try:
        verify_files(checkpoint, state, first=dist.get_rank(), every=world_size)
    except DamagedCheckpoint as error:
        own = error.what
    found: list[str | None] = [own]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, own)
    for what in filter(None, found):
        raise DamagedCheckpoint(checkpoint, what)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".split("\n")[0]
