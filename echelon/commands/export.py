"""`echelon export`: a checkpoint as a folder that transformers and vLLM load."""

import argparse
import sys
from pathlib import Path

from echelon.run_folder import RunFolder
from learner.checkpoint_folder import checkpoint_path, list_checkpoints


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, where there is no such checkpoint or OUT is in use."""
    folder = RunFolder(args.run_dir)
    config = folder.config()
    checkpoint = _checkpoint(folder, args.step)
    out = Path(args.out)
    # torch, seconds: after what can be checked without it.
    from transformers.utils.logging import disable_progress_bar

    from learner.export import export_checkpoint

    disable_progress_bar()
    export_checkpoint(checkpoint, config.model, out, config.rollout.dtype)
    sys.stdout.write(f"{checkpoint.name} of {folder.path} is now {out}\n")
    return 0


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    checkpoints = list_checkpoints(folder.checkpoints)
    if not checkpoints:
        raise ValueError(f"{folder.path} has no checkpoint yet")
    chosen = checkpoints[-1] if step is None else checkpoint_path(folder.checkpoints, step)
    if chosen not in checkpoints:
        raise ValueError(
            f"{folder.path} has no {chosen.name}: there are {', '.join(path.name for path in checkpoints)}"
        )
    return chosen
