"""A real run, audited and replayed; and what an audit says once somebody has been at its folder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripted_run import JournalRecords

from databus.journal import segment_path
from databus.records import BatchCut, BrokerStarted, GroupCompleted, GroupLeased, GroupMoved, StateSaved, StepTaken
from echelon.audit.run import audit_run
from echelon.cli import main
from echelon.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, GROUPS = 6, 4


@pytest.fixture(scope="module")
def folder(write_recipe, start_run, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of six steps with checkpoints after two, four and six, all of its journal kept."""
    path = tmp_path_factory.mktemp("audited")
    settings = ("learner.checkpoint_every=2", "learner.keep_checkpoints=3", "journal.keep=true", "eval.every=0")
    run = start_run(write_recipe(path), path / "run", *settings)
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    return RunFolder(run.folder)


def test_audit_passes(folder: RunFolder) -> None:
    report = audit_run(folder)
    assert [violation.line() for violation in report.violations] == []
    assert (report.first_step, report.last_step, report.num_rows, report.num_checkpoints) == (0, STEPS - 1, STEPS, 3)
    assert report.groups["trained"] == STEPS * GROUPS
    assert 0 < report.loss_tokens <= report.tokens
    assert report.max_lag <= 2


def test_replay_is_the_same_to_the_last_bit(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main(["replay", str(folder.path)]) == 0, capsys.readouterr().err
    stdout = capsys.readouterr().out
    assert stdout.startswith("from the initial model\n")
    assert stdout.endswith(f"{STEPS} steps came out the same\n")


def test_replay_from_a_checkpoint(folder: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main(["replay", str(folder.path), "--steps", "5:6"]) == 0, capsys.readouterr().err
    stdout = capsys.readouterr().out
    assert stdout.startswith("from step-000004\n")
    assert stdout.endswith("2 steps came out the same\n")


# ---------------------------------------------------------------- somebody has been at it


def other_id(journal: JournalRecords) -> None:
    index = journal.where(GroupLeased)[-1]
    journal.change(index, cursor=journal.records[index][0].cursor + 1)


def settled_after_training(journal: JournalRecords) -> None:
    index = journal.where(StepTaken, step=1)[0]
    group_id = first_group(journal, 1)
    journal.records.insert(index + 1, (GroupMoved(group_id=group_id, state="stale"), ()))


def trained_twice(journal: JournalRecords) -> None:
    (index,) = journal.where(BatchCut, step=1)
    _, *others = journal.records[index][0].group_ids
    journal.change(index, group_ids=(first_group(journal, 0), *others))


def copy_lost(journal: JournalRecords) -> None:
    del journal.records[journal.where(GroupCompleted, copied=True)[0]]


def copy_changed(journal: JournalRecords) -> None:
    index = journal.where(GroupCompleted, copied=True)[0]
    journal.change_group(index, rewards=journal.group(index).rewards + 1)


def torn_columns(journal: JournalRecords) -> None:
    index = completed(journal, first_group(journal, 2))
    journal.change_group(index, lengths=journal.group(index).lengths + 1)


def too_old(journal: JournalRecords) -> None:
    index = completed(journal, first_group(journal, 4))
    group = journal.group(index)
    journal.change_group(
        index, version_values=np.array([0], np.int32), version_lengths=np.array([group.num_tokens], np.int32)
    )


def small_batch(journal: JournalRecords) -> None:
    (index,) = journal.where(BatchCut, step=3)
    journal.change(index, group_ids=journal.records[index][0].group_ids[:-1])


def step_left_out(journal: JournalRecords) -> None:
    del journal.records[journal.where(StepTaken, step=2)[0]]


def other_state(journal: JournalRecords) -> None:
    index = journal.where(StateSaved)[-1]
    journal.change(index, next_cursor=journal.records[index][0].next_cursor + 1)


def other_run(journal: JournalRecords) -> None:
    journal.change(journal.where(BrokerStarted)[0], run_id="another")


def other_loss(journal: JournalRecords) -> None:
    (index,) = journal.where(StepTaken, step=3)
    journal.change(index, metrics=journal.records[index][0].metrics | {"loss/policy": 42.0})


def other_reward(journal: JournalRecords) -> None:
    index = completed(journal, first_group(journal, 0))
    journal.change_group(index, rewards=journal.group(index).rewards + 1)


PLANTED: dict[str, tuple[str, Callable[[JournalRecords], Any]]] = {
    "group id": ("group_id", other_id),
    "edge": ("edge", settled_after_training),
    "trained twice": ("trained_twice", trained_twice),
    "copy changed": ("copy", copy_changed),
    "copy lost": ("lost", copy_lost),
    "content": ("content", torn_columns),
    "staleness": ("staleness", too_old),
    "batch": ("batch", small_batch),
    "step": ("step", step_left_out),
    "state": ("state", other_state),
    "terms": ("terms", other_run),
    "loss": ("metrics", other_loss),
    "reward": ("metrics", other_reward),
}


@pytest.mark.parametrize(("category", "breaks"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_violation_is_found(
    category: str, breaks: Callable[[JournalRecords], Any], folder: RunFolder, tmp_path: Path
) -> None:
    journal = JournalRecords.read(folder.journal)
    breaks(journal)
    copy = copy_of(folder, tmp_path / "run")
    shutil.rmtree(copy.journal)
    journal.write_journal(copy.journal)
    assert category in {violation.category for violation in audit_run(copy).violations}


def test_rewriting_alone_changes_nothing(folder: RunFolder, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "run")
    shutil.rmtree(copy.journal)
    JournalRecords.read(folder.journal).write_journal(copy.journal)
    assert audit_run(copy).violations == ()


def test_damaged_journal(folder: RunFolder, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "run")
    segment = segment_path(copy.journal, 1)
    content = bytearray(segment.read_bytes())
    content[100] ^= 1
    segment.write_bytes(content)
    (violation, *_) = audit_run(copy).violations
    assert violation.category == "damage"
    assert violation.message.startswith(f"{segment}: damaged at byte ")


def test_damaged_checkpoint(folder: RunFolder, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "run")
    weights = next((copy.checkpoints / "step-000004").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (violation,) = audit_run(copy).violations
    assert violation.category == "checkpoint"
    assert "step-000004 is damaged" in violation.message


def test_row_that_was_touched_up(folder: RunFolder, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "run")
    rows = [msgspec.json.decode(line) for line in copy.metrics_file.read_bytes().splitlines()]
    rows[3]["reward/mean"] += 0.5
    copy.metrics_file.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    (violation,) = audit_run(copy).violations
    assert (violation.category, violation.step) == ("metrics", 3)


def test_replay_sees_a_batch_that_was_touched_up(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    journal = JournalRecords.read(folder.journal)
    index = completed(journal, first_group(journal, 1))
    journal.change_group(index, rewards=np.arange(4, dtype=np.float32))
    copy = copy_of(folder, tmp_path / "run")
    shutil.rmtree(copy.journal)
    journal.write_journal(copy.journal)
    assert main(["replay", str(copy.path), "--steps", "0:3"]) == 1
    assert "step 1 differs: " in capsys.readouterr().err


def copy_of(folder: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(folder.path, path)
    return RunFolder(path)


def first_group(journal: JournalRecords, step: int) -> str:
    (index,) = journal.where(BatchCut, step=step)
    return journal.records[index][0].group_ids[0]


def completed(journal: JournalRecords, group_id: str) -> int:
    return journal.where(GroupCompleted, group_id=group_id, copied=False)[0]
