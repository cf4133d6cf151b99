"""What `echelon serve` is told to load, as a folder of a model: checkpoints are exported first."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from echelon.commands.export import chosen_checkpoint
from echelon.run_folder import RunFolder
from learner.checkpoint_folder import step_of


@contextmanager
def open_folder(path: str) -> Iterator[tuple[Path, int | None]]:
    """While inside, (a model's folder, the version that it is; None where the folder does not say).

    Args: path: of such a folder, of a run, whose newest checkpoint is meant, or of a checkpoint in a run.
    Raises: ValueError, one line, where it is none of them, or cannot be read.
    """
    given = Path(path).expanduser().resolve()
    if not given.is_dir():
        raise ValueError(f"there is no folder {path}")
    if RunFolder(given).record_file.exists():
        checkpoint = chosen_checkpoint(RunFolder(given), None)
    elif RunFolder(given.parent.parent).record_file.exists() and given.parent.name == "checkpoints":
        checkpoint = given
    else:
        yield given, None
        return
    with tempfile.TemporaryDirectory(prefix="echelon-serve-") as out:
        _export(checkpoint, Path(out))
        yield Path(out), step_of(checkpoint)


def _export(checkpoint: Path, out: Path) -> None:
    from learner.export import export_checkpoint
    from rollout.merging import merge

    config = RunFolder(checkpoint.parent.parent).config()
    export_checkpoint(checkpoint, config.model, out, config.rollout.dtype, merge=merge)
