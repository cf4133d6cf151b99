"""Recorded steps taken again: the same batches, the same figures to the last bit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from learner_script import encode_batch, learner_run, make_groups, train

from databus.groups import Group, encode_group
from databus.journal import Journal
from databus.messages import BatchRequest
from databus.records import BatchCut, BrokerStarted, GroupCompleted, StepTaken
from echelon.cli import main
from echelon.config import DataConfig, RunConfig
from echelon.recorded_run import RecordedBus, RecordedRun
from echelon.replay import ReplayPlan, first_difference, plan_replay
from echelon.run_folder import RunFolder, RunRecord
from learner.batch import decode_batch
from learner.config import LearnerConfig
from learner.replay import replay_steps

STEPS = 4
LEARNER = LearnerConfig(
    steps=STEPS, lr=1e-3, schedule="cosine", checkpoint_every=2, microbatch_tokens=128, keep_checkpoints=10
)
CLOCKS = {"learner/wait_s", "learner/step_s", "learner/tokens_per_s", "learner/publish_s", "learner/save_s"}
PUBLISHED = {"weights/publish_s", "weights/published_bytes"}
"""Of versions: a replay publishes none."""


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of four steps with checkpoints after two and four, and its journal."""
    folder = RunFolder(tmp_path_factory.mktemp("recorded"))
    bus = train(tiny_model, folder.checkpoints, LEARNER)
    write_journal(folder.journal, bus.metrics())
    config = RunConfig(model=str(tiny_model), data=DataConfig(train="none"), learner=LEARNER, group_size=4)
    folder.config_file.write_bytes(msgspec.json.encode(config))
    folder.record_file.write_bytes(msgspec.json.encode(RunRecord(run_id="r", recipe="none")))
    return folder


def terms(**changes: Any) -> BrokerStarted:
    values: dict[str, Any] = {
        "run_id": "r", "steps": STEPS, "group_size": 4, "batch_groups": 4, "max_staleness": 2,
        "stale_policy": "drop", "max_tokens": 24,
    }  # fmt: skip
    return BrokerStarted(**values | changes)


def write_journal(folder: Path, metrics: Sequence[dict[str, float]], first: int = 0) -> None:
    journal = Journal(folder)
    journal.append(terms())
    for step in range(first, len(metrics)):
        add_batch(journal, step, make_groups(step))
        journal.append(StepTaken(step=step, metrics=metrics[step]))
    journal.close()


def add_batch(journal: Journal, step: int, groups: Sequence[Group]) -> None:
    for index, group in enumerate(groups):
        columns, frames = encode_group(group)
        journal.append(GroupCompleted(group_id=f"g{step}-{index}", worker="w", columns=columns), frames)
    journal.append(BatchCut(step=step, group_ids=tuple(f"g{step}-{index}" for index in range(len(groups)))))


def run_of(folder: RunFolder) -> RecordedRun:
    return RecordedRun(folder.journal, folder.config())


# ---------------------------------------------------------------- batches


def test_the_same_batch_is_served(recorded: RunFolder) -> None:
    bus = RecordedBus(run_of(recorded))
    assert bus.recv(0.0) is None
    bus.send(BatchRequest(step=2))
    answer = bus.recv(0.0)
    assert answer is not None
    batch, frames = encode_batch(2, make_groups(2))
    assert answer[0] == batch
    assert [bytes(frame) for frame in answer[1]] == [bytes(frame) for frame in frames]


def test_old_tokens_are_masked_as_the_broker_masked_them(tmp_path: Path, recorded: RunFolder) -> None:
    """The batch was cut under `mask` and a bound of 1; the run's configuration is another one by now."""
    journal = Journal(tmp_path / "journal")
    journal.append(terms(stale_policy="mask", max_staleness=1))
    groups = make_groups(3)
    add_batch(journal, 3, groups)
    journal.append(StepTaken(step=3, metrics={}))
    journal.close()
    run = RecordedRun(tmp_path / "journal", recorded.config())
    for group, served in zip(groups, decode_batch(*run.batch(3)), strict=True):
        expected = group.loss_mask.astype(bool) & (group.token_versions() >= 2)
        assert np.array_equal(served.loss_mask.astype(bool), expected)
        assert expected.sum() < group.loss_mask.sum()
    assert run.max_staleness(range(3, 4)) == 1


# ---------------------------------------------------------------- what can be replayed


@pytest.mark.parametrize(
    ("asked", "steps", "checkpoint"),
    [
        ((None, None), range(0, 4), None),
        ((1, 2), range(0, 2), None),
        ((2, None), range(2, 4), "step-000002"),
        ((3, 4), range(2, 4), "step-000002"),
    ],
)
def test_plan(asked: tuple, steps: range, checkpoint: str | None, recorded: RunFolder) -> None:
    plan = plan_replay(run_of(recorded), recorded.checkpoints, *asked)
    assert plan == ReplayPlan(steps, recorded.checkpoints / checkpoint if checkpoint else None)


def test_plan_where_early_batches_are_gone(recorded: RunFolder, tmp_path: Path) -> None:
    write_journal(tmp_path / "journal", [{}] * STEPS, first=1)
    run = RecordedRun(tmp_path / "journal", recorded.config())
    assert run.steps() == range(1, 4)
    assert plan_replay(run, recorded.checkpoints, None, None).steps == range(2, 4)
    with pytest.raises(ValueError, match=r"only steps from 2 on can be replayed.*journal\.keep=true"):
        plan_replay(run, recorded.checkpoints, 0, None)
    with pytest.raises(ValueError, match="nothing to replay"):
        plan_replay(run, tmp_path / "no checkpoints", None, None)


def test_plan_with_steps_that_there_are_not(recorded: RunFolder) -> None:
    for asked in ((0, 5), (3, 3), (4, None)):
        with pytest.raises(ValueError, match="the run's last step is 3"):
            plan_replay(run_of(recorded), recorded.checkpoints, *asked)


# ---------------------------------------------------------------- taking them again


@pytest.mark.parametrize("start", [0, 2])
def test_figures_are_the_same_to_the_last_bit(start: int, recorded: RunFolder, tiny_model: Path) -> None:
    run = run_of(recorded)
    checkpoint = recorded.checkpoints / "step-000002" if start else None
    taken: dict[int, dict[str, float]] = {}
    settings = learner_run(tiny_model, recorded.checkpoints, resume_from=checkpoint)
    replay_steps(LEARNER, settings, STEPS, lambda step: RecordedBus(run), taken.__setitem__)
    assert list(taken) == list(range(start, STEPS))
    for step, metrics in taken.items():
        assert metrics == {name: value for name, value in run.metrics[step].items() if name not in CLOCKS | PUBLISHED}


def test_difference() -> None:
    before = {"loss/policy": 1.0, "learner/grad_norm": 2.0, "learner/lr": 0.1, "learner/step_s": 5.0}
    after = {"loss/policy": 1.0, "learner/grad_norm": 2.0, "learner/lr": 0.1}
    assert first_difference(before, after, 0.0) is None
    difference = first_difference(before, after | {"learner/grad_norm": 2.0000001, "learner/lr": 0.2}, 0.0)
    assert difference is not None and difference.name == "learner/grad_norm"
    assert first_difference(before, after | {"learner/grad_norm": 2.0000001}, 1e-6) is None
    assert first_difference({"loss/policy": 1.0}, {"loss/policy": 1.0, "learner/grad_norm": 2.0}, 0.0) is not None


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_command_takes_the_steps_again(recorded: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main(["replay", str(recorded.path), "--steps", "3:"]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "from step-000002"
    assert [(line.split()[0], line.split()[-1]) for line in lines[2:4]] == [("2", "same"), ("3", "same")]
    assert repr(run_of(recorded).metrics[3]["loss/policy"]) in lines[3]
    assert lines[4] == "2 steps came out the same"


@pytest.mark.slow
def test_command_names_the_first_difference(recorded: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copied(recorded, tmp_path / "run", lambda metrics: metrics[1].update({"learner/grad_norm": 0.5}))
    assert main(["replay", str(folder.path), "--steps", "0:2"]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines()[2].endswith("same") and stdout.splitlines()[3].endswith("differs")
    assert stderr.startswith("echelon: step 1 differs: learner/grad_norm was 0.5, is now ")


@pytest.mark.slow
def test_command_uses_as_many_ranks_as_the_run(
    recorded: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Recorded by one rank, taken again by two: sums in another order, so not the same bits."""
    folder = copied(recorded, tmp_path / "run")
    config = folder.config()
    learner = msgspec.structs.replace(config.learner, ranks=2)
    folder.config_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, learner=learner)))
    assert main(["replay", str(folder.path), "--tolerance", "0.01"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("4 steps came out the same\n")
    assert main(["replay", str(folder.path)]) == 1
    assert "differs: " in capsys.readouterr().err


@pytest.mark.slow
def test_command_says_why_it_failed(recorded: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = copied(recorded, tmp_path / "run")
    config = msgspec.structs.replace(folder.config(), model=str(tmp_path / "gone"))
    folder.config_file.write_bytes(msgspec.json.encode(config))
    assert main(["replay", str(folder.path)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("echelon: the replay failed: ") and str(tmp_path / "gone") in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--steps", "3"], "--steps 3: expected FIRST:STOP"),
        (["--steps", "0:9"], "--steps 0:9: the run's last step is 3"),
        (["--tolerance", "2"], "expected a number from 0 to below 1, got '2'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], error: str, recorded: RunFolder, capsys: pytest.CaptureFixture
) -> None:
    try:
        code = main(["replay", str(recorded.path), *words])
    except SystemExit as exit_:
        code = exit_.code
    stderr = capsys.readouterr().err
    assert code == 2
    assert error in stderr and stderr.count("\n") == 1


def copied(
    recorded: RunFolder, path: Path, change: Callable[[list[dict[str, float]]], Any] = lambda metrics: None
) -> RunFolder:
    """The run once more, with other figures recorded."""
    folder = RunFolder(path)
    path.mkdir()
    metrics = [dict(run_of(recorded).metrics[step]) for step in range(STEPS)]
    change(metrics)
    write_journal(folder.journal, metrics)
    for name in ("config.json", "run.json"):
        (path / name).write_bytes((recorded.path / name).read_bytes())
    (path / "checkpoints").symlink_to(recorded.checkpoints)
    return folder
