"""Which checkpoint is exported; what becomes of it is tests/learner/test_export.py's."""

from pathlib import Path

import msgspec
import pytest

from databus.messages import Position
from echelon.commands.export import best_checkpoint, chosen_checkpoint
from echelon.run_folder import RunFolder
from learner.checkpoint_folder import TrainerState, finish_checkpoint, start_checkpoint

ACCURACIES = {0: 0.1, 10: 0.5, 15: 0.9, 20: 0.7, 30: 0.2, 40: 0.7, 50: 0.6}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that keeps the newest one and the best: 10 to 50 were saved, 0 to 50 evaluated."""
    folder = RunFolder(tmp_path)
    known: dict[int, float | None] = {}
    for step in (10, 20, 30, 40, 50):
        known |= {version: value for version, value in ACCURACIES.items() if version < step}
        position = Position(step=step, next_cursor=0, pending=(), counts={}, accuracies=known)
        start_checkpoint(folder.checkpoints, step)
        state = TrainerState(step=step, model="m", world_size=1, position=position)
        finish_checkpoint(folder.checkpoints, state, keep=1, keep_best=1)
    rows = [{"step": version, "eval/accuracy": value} for version, value in ACCURACIES.items()]
    folder.metrics_file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in [{"step": 1}, *rows]))
    return folder


def test_best_is_of_those_that_are_there(folder: RunFolder) -> None:
    assert best_checkpoint(folder) == folder.checkpoints / "best" / "step-000040"


def test_newest_may_be_the_best(folder: RunFolder) -> None:
    with folder.metrics_file.open("a") as file:
        file.write('{"step":50,"eval/accuracy":0.7}\n')
    assert best_checkpoint(folder) == folder.checkpoints / "step-000050", "of equals the newer"


def test_by_step_wherever_it_lies(folder: RunFolder) -> None:
    assert chosen_checkpoint(folder, None) == folder.checkpoints / "step-000050"
    assert chosen_checkpoint(folder, 40) == folder.checkpoints / "best" / "step-000040"
    with pytest.raises(ValueError, match="has no step-000030: there are step-000040, step-000050"):
        chosen_checkpoint(folder, 30)


def test_none_was_evaluated(folder: RunFolder) -> None:
    folder.metrics_file.write_text('{"step":10,"eval/accuracy":0.5}\n')
    with pytest.raises(ValueError, match="has no checkpoint that was evaluated"):
        best_checkpoint(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    for choose in (best_checkpoint, lambda folder: chosen_checkpoint(folder, None)):
        with pytest.raises(ValueError, match="has no checkpoint yet"):
            choose(RunFolder(tmp_path))
