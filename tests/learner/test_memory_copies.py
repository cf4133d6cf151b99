import logging
import os
from pathlib import Path

import pytest
import torch
from learner_script import ScriptedBus, learner_run, train

from databus.messages import BatchRequest
from learner import memory_copies
from learner.checkpoint_folder import (
    TrainerState,
    finish_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    read_trainer_state,
    start_checkpoint,
)
from learner.config import LearnerConfig
from learner.memory_copies import num_bytes, restart_point
from learner.run import run_learner

EVERY_STEP = LearnerConfig(steps=5, lr=1e-3, checkpoint_every=3, memory_copy_every=1)


def make(folder: Path, step: int) -> Path:
    (start_checkpoint(folder, step) / "weights").write_bytes(b"some weights")
    return finish_checkpoint(folder, TrainerState(step=step, model="m", world_size=1, position=None), keep=9)


def test_the_newest_counts_wherever_it_is(tmp_path: Path) -> None:
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    assert restart_point(disk, memory) is None
    first = make(disk, 3)
    assert restart_point(disk, None) == restart_point(disk, memory) == first
    copy = make(memory, 4)
    assert restart_point(disk, memory) == copy
    assert restart_point(tmp_path / "nothing", memory) == copy
    assert restart_point(disk, None) == first
    later = make(disk, 4)
    assert restart_point(disk, memory) == later


@pytest.mark.parametrize("damage", ["change", "cut", "remove", "garble"])
def test_damaged_copy_is_passed_over(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    checkpoint, weights = make(disk, 3), make(memory, 4) / "weights"
    match damage:
        case "change":
            weights.write_bytes(b"some wEights")
        case "cut":
            weights.write_bytes(b"some weight")
        case "remove":
            weights.unlink()
        case "garble":
            (weights.parent / "trainer.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert restart_point(disk, memory) == checkpoint
    assert "going on from the disk" in caplog.text
    assert "is damaged" in caplog.text


def test_half_a_copy_is_none(tmp_path: Path) -> None:
    (start_checkpoint(tmp_path / "memory", 4) / "weights").write_bytes(b"some")
    assert restart_point(tmp_path / "disk", tmp_path / "memory") is None


def test_a_copy_is_what_a_checkpoint_is(tiny_model: Path, tmp_path: Path) -> None:
    """Of the step before the last, where no checkpoint was due; what comes of it equals the uninterrupted run."""
    memory = tmp_path / "memory"
    memory.mkdir()
    bus = train(tiny_model, tmp_path / "disk", EVERY_STEP, memory_dir=memory)
    (copy,) = list_checkpoints(memory)
    assert read_trainer_state(copy).step == 4
    resumed = train(tiny_model, tmp_path / "resumed", EVERY_STEP, resume_from=copy)
    same = ("loss/policy", "learner/grad_norm", "learner/lr")
    assert [[row[name] for name in same] for row in resumed.metrics()] == [
        [row[name] for name in same] for row in bus.metrics()[4:]
    ]
    ours, theirs = (read_trainer_state(tmp_path / name / "step-000005") for name in ("resumed", "disk"))
    assert [file.xxh3 for file in ours.files if file.name.endswith("distcp")] == [
        file.xxh3 for file in theirs.files if file.name.endswith("distcp")
    ]


def test_copies_are_as_far_apart_as_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    taken: list[int] = []

    class Copies(memory_copies.MemoryCopies):
        def save(self, state: TrainerState, tensors: dict) -> None:
            taken.append(state.step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learner.run.MemoryCopies", Copies)
        config = LearnerConfig(steps=8, checkpoint_every=4, memory_copy_every=2)
        train(tiny_model, tmp_path / "disk", config, memory_dir=tmp_path)
        assert taken == [2, 6], "where a checkpoint is due there is one"
        taken.clear()
        train(tiny_model, tmp_path / "more", config, memory_dir=tmp_path, resume_from=tmp_path / "disk/step-000004")
        assert taken == [6]


def test_a_copy_is_begun_when_the_broker_knows_of_the_step_before_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so by handing over the next batch; a learner that came back to more than that would wait for ever."""
    bus = ScriptedBus(EVERY_STEP.steps)
    handed: list[tuple[int, bool]] = []

    class Copies(memory_copies.MemoryCopies):
        def save(self, state: TrainerState, tensors: dict) -> None:
            handed.append((state.step, BatchRequest(step=state.step) in bus.sent))

    monkeypatch.setattr("learner.run.MemoryCopies", Copies)
    run_learner(EVERY_STEP, learner_run(tiny_model, tmp_path / "disk", memory_dir=tmp_path), lambda version: bus)
    assert handed == [(1, True), (2, True), (4, True)]


def test_no_room_is_said_before_anything_is_lost(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(memory_copies.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"learner\.memory_copy_every needs [\d,]+ bytes in .*, which has 1,000 free"):
        train(tiny_model, tmp_path / "disk", EVERY_STEP, memory_dir=tmp_path)


def test_a_copy_that_fails_costs_nothing(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = tmp_path / "memory"
    memory.mkdir(mode=0o500)
    if os.access(memory, os.W_OK):  # root may write anywhere
        memory.rmdir()
        memory.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        bus = train(tiny_model, tmp_path / "disk", EVERY_STEP, memory_dir=memory)
    assert len(bus.metrics()) == 5
    assert latest_checkpoint(tmp_path / "disk") == tmp_path / "disk" / "step-000005"
    assert "a copy in memory is missing: checkpoint of step 1 could not be written" in caplog.text


def test_bytes_are_counted() -> None:
    assert num_bytes({"a": torch.zeros(3, 4), "b": {"c": torch.zeros(2, dtype=torch.bfloat16), "d": 5}}) == 52


def test_without_a_folder_there_are_none(tiny_model: Path, tmp_path: Path) -> None:
    assert learner_run(tiny_model, tmp_path).memory_dir is None
    train(tiny_model, tmp_path, EVERY_STEP)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000005"]
