"""A run's journal and rows, read for what everything took."""

import json
from pathlib import Path

import numpy as np
import pytest
from scripted import make_group

from databus.groups import encode_group
from databus.journal import Journal, segment_path
from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, StepTaken
from echelon.plan.trace import LearnerStep, read_trace
from echelon.run_folder import RunFolder

START = 1.7e9


def lease(group_id: str, at: float, worker: str = "w") -> GroupLeased:
    return GroupLeased(group_id=group_id, cursor=0, attempt=0, worker=worker, time_s=START + at, predicted_tokens=5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Three groups: `a` comes in, `b` after its lease had expired, `c` never; one step of the first two."""
    journal = Journal(tmp_path / "journal")
    for group_id, at in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        journal.append(lease(group_id, at))
    for group_id, at in (("b", 4.0), ("c", 5.0)):
        journal.append(GroupMoved(group_id=group_id, state="expired", time_s=START + at))
    for group_id, at, lengths in (("a", 6.0, [2, 3]), ("b", 8.0, [4, 1])):
        columns, frames = encode_group(make_group((7, 8, 9), [[1] * length for length in lengths]))
        record = GroupCompleted(group_id=group_id, worker="w", columns=columns, time_s=START + at, score_s=0.25)
        journal.append(record, frames)
    journal.append(BatchCut(step=0, group_ids=("a", "b"), time_s=START + 9.0))
    journal.append(StepTaken(step=0, metrics={}, time_s=START + 12.0))
    journal.close()
    (tmp_path / "run.json").write_text('{"run_id": "r", "recipe": "some"}')
    rows = [{"step": step, "loss/policy": 0.0} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFolder(tmp_path)


def test_leases_results_and_steps_are_found(folder: RunFolder) -> None:
    trace = read_trace(folder)
    first, second = trace.groups
    assert (first.start, first.end, first.predicted, first.score_s) == (START, START + 6, 5, 0.25)
    assert (first.prompt, first.group.prompt_tokens, first.group.lengths.tolist()) == ((7, 8, 9), 3, [2, 3])
    assert (second.start, second.end) == (START + 1, START + 8), "a late result was worked on all the time"
    assert trace.lost == [("w", START + 2, START + 5)]
    assert trace.steps == [LearnerStep(0, START + 9, START + 12, 10)]
    assert len(trace.rows) == 3


def test_what_is_read_outlives_the_journals_buffers(folder: RunFolder) -> None:
    lengths = [group.group.lengths for group in read_trace(folder).groups]
    assert all(isinstance(each, np.ndarray) and each.flags.owndata for each in lengths)


def test_a_damaged_journal_is_one_line(folder: RunFolder) -> None:
    segment_path(folder.journal, 1).write_bytes(b"something else altogether")
    with pytest.raises(ValueError, match="journal cannot be read: ") as told:
        read_trace(folder)
    assert "\n" not in str(told.value)
