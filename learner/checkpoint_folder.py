"""Folders of checkpoints: a folder a step, complete or absent.

    checkpoints/step-000020/        a distributed checkpoint (DCP) and trainer.json, which lists and hashes its files
    checkpoints/best/step-000010/   one that is kept for its accuracy, though newer ones have taken its place

A checkpoint is written as step-000020.tmp and renamed when everything is on the disk.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import xxhash
from msgspec import Struct

from databus.messages import Position
from learner.config import LoraConfig

TRAINER_FILE = "trainer.json"
TEMPORARY = ".tmp"
BEST = "best"
HASH_BLOCK_BYTES = 1 << 22

_name = re.compile(r"step-(\d{6,})")


class FileRecord(Struct, frozen=True, kw_only=True):
    name: str
    num_bytes: int
    xxh3: int


class TrainerState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """trainer.json. step: optimizer steps taken, so also the policy version. position: the broker's, at that step.
    world_size: ranks that wrote it; any number may read it. files: what the folder holds besides this file. lora: the
    adapters; where there are any, they are all that it holds of the model."""

    step: int
    model: str
    world_size: int
    position: Position | None
    files: tuple[FileRecord, ...] = ()
    lora: LoraConfig = LoraConfig()


class DamagedCheckpoint(ValueError):
    """what: the file, and what is wrong with it."""

    def __init__(self, checkpoint: Path, what: str) -> None:
        super().__init__(f"checkpoint {checkpoint} is damaged: {what}")
        self.checkpoint = checkpoint
        self.what = what

    def advised(self) -> str:
        """One line that says, too, what a user can do. Where this is the only one, the first batches may be gone."""
        before = [path for path in list_checkpoints(self.checkpoint.parent) if step_of(path) < step_of(self.checkpoint)]
        what = (
            f"remove that folder to go on from {before[-1].name}" if before else "there is none before it to go on from"
        )
        return f"{self}; {what}"


def checkpoint_path(checkpoints_dir: Path, step: int) -> Path:
    return checkpoints_dir / f"step-{step:06d}"


def temporary_path(checkpoints_dir: Path, step: int) -> Path:
    return checkpoints_dir / f"step-{step:06d}{TEMPORARY}"


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. An unfinished one bears another name."""
    if not checkpoints_dir.is_dir():
        return []
    steps = {int(match[1]): path for path in checkpoints_dir.iterdir() if (match := _name.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps) if (steps[step] / TRAINER_FILE).is_file()]


def kept_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """The best and the newest, oldest first. Only the newest are there to go on from."""
    return [*list_checkpoints(checkpoints_dir / BEST), *list_checkpoints(checkpoints_dir)]


def step_of(checkpoint: Path) -> int:
    """By its name."""
    return int(checkpoint.name.partition("-")[2])


def latest_checkpoint(checkpoints_dir: Path) -> Path | None:
    return next(reversed(list_checkpoints(checkpoints_dir)), None)


def oldest_checkpoint(checkpoints_dir: Path) -> int:
    """Steps taken at the oldest checkpoint; 0 where there is none: then one can only go on from the beginning."""
    return next((step_of(path) for path in list_checkpoints(checkpoints_dir)), 0)


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Raises: ValueError, in one line, where there is no complete checkpoint; DamagedCheckpoint."""
    try:
        return msgspec.json.decode((checkpoint / TRAINER_FILE).read_bytes(), type=TrainerState)
    except FileNotFoundError:
        raise ValueError(f"no complete checkpoint at {checkpoint}: it has no {TRAINER_FILE}") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise DamagedCheckpoint(checkpoint, f"{TRAINER_FILE}: {error}") from None


def verify_files(checkpoint: Path, state: TrainerState, first: int = 0, every: int = 1) -> None:
    """Args: first, every: which of the files to read; sizes are checked of all.

    Raises: DamagedCheckpoint naming the first file that is missing or not as it was written.
    """
    verify_sizes(checkpoint, state)
    for record in state.files[first::every]:
        if _hash(checkpoint / record.name) != record.xxh3:
            raise DamagedCheckpoint(checkpoint, f"the contents of {record.name} have changed")


def verify_sizes(checkpoint: Path, state: TrainerState) -> None:
    """Raises: DamagedCheckpoint naming the first file that is missing or has another size."""
    for record in state.files:
        path = checkpoint / record.name
        if not path.is_file() or path.stat().st_size != record.num_bytes:
            raise DamagedCheckpoint(checkpoint, f"{record.name} is missing or has another size")


def start_checkpoint(checkpoints_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what a killed run left unfinished goes."""
    _clear_unfinished(checkpoints_dir)
    temporary = temporary_path(checkpoints_dir, step)
    temporary.mkdir(parents=True)
    return temporary


def finish_checkpoint(checkpoints_dir: Path, state: TrainerState, keep: int, keep_best: int = 0) -> Path:
    """Complete what `start_checkpoint` began: trainer.json, fsync, rename. Delete all but the newest `keep`, and the
    best `keep_best` others, as far as `state.position` says how good they are."""
    temporary, final = temporary_path(checkpoints_dir, state.step), checkpoint_path(checkpoints_dir, state.step)
    _write_trainer_file(temporary, state)
    _replace(temporary, final)
    accuracies = state.position.accuracies if keep_best and state.position is not None else {}
    _retire(list_checkpoints(checkpoints_dir)[:-keep], checkpoints_dir / BEST, accuracies)
    if keep_best:
        _keep_best(checkpoints_dir / BEST, accuracies, keep_best)
    return final


def _write_trainer_file(folder: Path, state: TrainerState) -> None:
    records = [
        FileRecord(name=path.name, num_bytes=path.stat().st_size, xxh3=_hash(path)) for path in sorted(folder.iterdir())
    ]
    content = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(state, files=tuple(records))))
    with (folder / TRAINER_FILE).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _replace(temporary: Path, final: Path) -> None:
    """Put the finished folder in its place; one of the same step, from a history given up, makes room."""
    if final.exists():
        final.rename(final.with_name(f"{final.name}.old{TEMPORARY}"))
    temporary.rename(final)
    _sync_folder(final.parent)
    _clear_unfinished(final.parent)


def _retire(old: Iterable[Path], best_dir: Path, accuracies: Mapping[int, float | None]) -> None:
    """Those whose version was evaluated, or is being evaluated, have a chance to be the best; the others go."""
    for checkpoint in old:
        if step_of(checkpoint) not in accuracies:
            _delete(checkpoint)
            continue
        best_dir.mkdir(exist_ok=True)
        _replace(checkpoint, best_dir / checkpoint.name)


def _keep_best(best_dir: Path, accuracies: Mapping[int, float | None], keep: int) -> None:
    """Of equals the newer one stays, and so does what is still being evaluated."""
    known: list[tuple[float, Path]] = []
    for checkpoint in list_checkpoints(best_dir):
        accuracy = accuracies.get(step_of(checkpoint), -1.0)
        if accuracy is not None:
            known.append((accuracy, checkpoint))
    known.sort(key=lambda each: (each[0], step_of(each[1])))
    for _, checkpoint in known[: max(0, len(known) - keep)]:
        _delete(checkpoint)


def _delete(checkpoint: Path) -> None:
    # Renamed first: a kill during the deletion must not leave half a checkpoint under a good name.
    doomed = checkpoint.with_name(checkpoint.name + TEMPORARY)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _clear_unfinished(checkpoints_dir: Path) -> None:
    for path in (*checkpoints_dir.glob(f"step-*{TEMPORARY}"), *checkpoints_dir.glob(f"{BEST}/step-*{TEMPORARY}")):
        shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> int:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.intdigest()
