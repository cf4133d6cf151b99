"""Does a checkpoint hold what a model and an optimizer need, no less and no more?"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from learner.checkpoint_folder import DamagedCheckpoint

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")

Shapes = Mapping[str, tuple[int, ...] | None]
"""By name, as DCP joins the keys of nested dictionaries; None for what is no tensor."""


def check_contents(checkpoint: Path, tensors: dict[str, Any]) -> None:
    """DCP itself overlooks what a checkpoint has too much: more layers, for example.

    Args: tensors: nested; the checkpoint's other first names are not looked at.
    Raises: ValueError, in one line naming the first difference.
    """
    ours = _shapes_of(tensors)
    theirs = {name: shape for name, shape in _stored_shapes(checkpoint).items() if name.partition(".")[0] in tensors}
    for part, what in _differences(ours, theirs):
        raise ValueError(f"checkpoint {checkpoint} is of another {part}: {what}")


def _differences(ours: Shapes, theirs: Shapes) -> Iterator[tuple[str, str]]:
    """(model or optimizer, what differs); the model first, as an optimizer's state follows from it."""
    for name in sorted(ours.keys() | theirs.keys()):
        part, _, own_name = name.partition(".")
        if name not in ours:
            yield part, f"it has {own_name}, which this one has not"
        elif name not in theirs:
            yield part, f"it has no {own_name}"
        elif ours[name] != theirs[name]:
            yield part, f"{own_name} is {_said(theirs[name])} there, {_said(ours[name])} here{_hint(name)}"


def _said(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"of shape {list(shape)}"


def _hint(name: str) -> str:
    return " (another vocabulary)" if name.endswith(EMBEDDINGS) else ""


def _shapes_of(tensors: dict[str, Any]) -> Shapes:
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors)
    return {name: _shape(getattr(value, "shape", None)) for name, value in planner.state_dict.items()}


def _stored_shapes(checkpoint: Path) -> Shapes:
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
        stored = metadata.state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise DamagedCheckpoint(checkpoint, f".metadata cannot be read: {error}") from None
    return {name: _shape(getattr(value, "size", None)) for name, value in stored.items()}


def _shape(size: Any) -> tuple[int, ...] | None:
    return None if size is None else tuple(size)
