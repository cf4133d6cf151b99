"""`echelon export`: a checkpoint as a folder that transformers and vLLM load."""

import argparse
import sys
from pathlib import Path

from databus.evaluation import ACCURACY
from echelon.files import read_rows
from echelon.run_folder import RunFolder
from learner.checkpoint_folder import checkpoint_path, kept_checkpoints, step_of


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, where there is no such checkpoint or OUT is in use."""
    folder = RunFolder(args.run_dir)
    config = folder.config()
    checkpoint = best_checkpoint(folder) if args.best else chosen_checkpoint(folder, args.step)
    out = Path(args.out)
    # torch, seconds: after what can be checked without it.
    from transformers.utils.logging import disable_progress_bar

    from learner.export import export_checkpoint
    from rollout.merging import merge

    disable_progress_bar()
    export_checkpoint(checkpoint, config.model, out, config.rollout.dtype, merge=merge)
    sys.stdout.write(f"{checkpoint.name} of {folder.path} is now {out}\n")
    return 0


def chosen_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The one of this step, else the newest. Raises: ValueError."""
    kept = _kept(folder)
    if step is None:
        return list(kept.values())[-1]
    if step not in kept:
        there = ", ".join(path.name for path in kept.values())
        raise ValueError(f"{folder.path} has no {checkpoint_path(folder.checkpoints, step).name}: there are {there}")
    return kept[step]


def best_checkpoint(folder: RunFolder) -> Path:
    """Of those that are there, the one whose version was the most accurate; of equals the newer. Raises: ValueError."""
    kept = _kept(folder)
    rows = read_rows(folder.metrics_file)
    evaluated = [(row[ACCURACY], row["step"]) for row in rows if ACCURACY in row and row["step"] in kept]
    if not evaluated:
        raise ValueError(
            f"{folder.path} has no checkpoint that was evaluated: eval.every and checkpoint_every say when"
        )
    _, step = max(evaluated)
    return kept[step]


def _kept(folder: RunFolder) -> dict[int, Path]:
    """By step, the newest last. Raises: ValueError where there is none."""
    kept = {step_of(path): path for path in kept_checkpoints(folder.checkpoints)}
    if not kept:
        raise ValueError(f"{folder.path} has no checkpoint yet")
    return kept
