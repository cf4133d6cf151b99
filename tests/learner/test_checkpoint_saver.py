import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import die_while_saving, make_groups, train

from databus.messages import StepDone
from learner import checkpoint_saver
from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.checkpoint_folder import TrainerState, list_checkpoints
from learner.checkpoint_saver import CheckpointSaver
from learner.config import LearnerConfig
from learner.host_copy import HostCopy
from learner.model import ModelOptions, PolicyModel, build_model
from learner.optimizer import build_optimizer
from learner.train_step import TrainStep

CONFIG = LearnerConfig(lr=1e-2)


class Training:
    def __init__(self, model: Path) -> None:
        self.policy: PolicyModel = build_model(model, ModelOptions())
        self.optimizer, scheduler = build_optimizer(self.policy.parameters(), CONFIG)
        self._train_step = TrainStep(self.policy, self.optimizer, scheduler, CONFIG)
        self._steps = 0

    def step(self) -> None:
        self._train_step(make_groups(self._steps), self._steps)
        self._steps += 1

    def state(self) -> dict[str, Any]:
        return state_tensors(self.policy.causal_lm, self.optimizer)

    def values(self) -> list[torch.Tensor]:
        """Weights and moments, each by itself."""
        tensors = [*self.policy.parameters()]
        tensors += [value for each in self.policy.parameters() for value in self.optimizer.state[each].values()]
        return [(each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone() for each in tensors]  # type: ignore[operator]

    def equals(self, values: list[torch.Tensor]) -> bool:
        return all(torch.equal(ours, theirs) for ours, theirs in zip(self.values(), values, strict=True))


def state_of(step: int) -> TrainerState:
    return TrainerState(step=step, model="some/model", world_size=1, position=None)


@pytest.fixture
def training(single_rank: None, tiny_model: Path) -> Training:
    training = Training(tiny_model)
    training.step()
    return training


@pytest.fixture
def saver(single_rank: None, tmp_path: Path) -> Iterator[CheckpointSaver]:
    saver = CheckpointSaver(tmp_path / "checkpoints", keep=9, background=True, timeout_s=30.0)
    yield saver
    saver.close()


def test_what_is_saved_is_the_step_that_was_not_what_came_since(
    training: Training, saver: CheckpointSaver, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def write_later(*args: Any, **more: Any) -> Path:
        assert go_on.wait(30.0)
        return write_checkpoint(*args, **more)

    monkeypatch.setattr(checkpoint_saver, "write_checkpoint", write_later)
    before = training.values()
    saver.save(state_of(1), training.state())
    training.step()  # goes on while nothing has been written yet
    assert list_checkpoints(tmp_path / "checkpoints") == []
    go_on.set()
    saver.wait()
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    loaded = Training(tiny_model)
    load_checkpoint(checkpoint, loaded.policy.causal_lm, loaded.optimizer)
    assert loaded.equals(before)
    assert not training.equals(before)


def test_the_next_waits_for_the_one_before(
    training: Training, saver: CheckpointSaver, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are taken into the same memory."""

    def write_slowly(*args: Any, **more: Any) -> Path:
        time.sleep(0.2)
        return write_checkpoint(*args, **more)

    monkeypatch.setattr(checkpoint_saver, "write_checkpoint", write_slowly)
    before = training.values()
    saver.save(state_of(1), training.state())
    training.step()
    saver.save(state_of(2), training.state())
    saver.wait()
    first, second = list_checkpoints(tmp_path / "checkpoints")
    for checkpoint, values in ((first, before), (second, training.values())):
        loaded = Training(tiny_model)
        load_checkpoint(checkpoint, loaded.policy.causal_lm, loaded.optimizer)
        assert loaded.equals(values)


def test_failure_is_heard_of_at_the_next_step(training: Training, saver: CheckpointSaver, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver.save(state_of(7), training.state())
    with pytest.raises(RuntimeError, match=r"checkpoint of step 7 could not be written to .*checkpoints") as raised:
        while True:
            saver.check()
    assert "\n" not in str(raised.value)
    saver.check()  # once is enough


@pytest.mark.parametrize("steps", [1, 9])
def test_failure_ends_the_run(steps: int, tiny_model: Path, tmp_path: Path) -> None:
    """Of the last one, too."""
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RuntimeError, match="checkpoint of step 1 could not be written"):
        train(tiny_model, tmp_path / "checkpoints", LearnerConfig(steps=steps, checkpoint_every=1))
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_what_ends_a_run_otherwise_is_its_cause(
    training: Training, saver: CheckpointSaver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver.save(state_of(7), training.state())
    with caplog.at_level(logging.ERROR):
        saver.close()
    assert "the last checkpoint failed" in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_a_run_has_its_last_checkpoint_when_it_ends(background: bool, tiny_model: Path, tmp_path: Path) -> None:
    config = LearnerConfig(steps=2, checkpoint_every=1, async_checkpoints=background)
    bus = train(tiny_model, tmp_path, config)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    assert all(message.metrics["learner/save_s"] >= 0 for message in bus.sent if isinstance(message, StepDone))
    assert bus.metrics()[0]["learner/save_s"] == 0 < bus.metrics()[1]["learner/save_s"]


def test_sigkill_while_saving_leaves_nothing_that_looks_whole(
    run_ranks: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    arguments = [str(tiny_model), str(checkpoints), str(tmp_path / "metrics"), "-", "steps=9", "checkpoint_every=2"]
    run_ranks(1, arguments, die_while_saving, exit_code=-9)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000004.tmp"]
    (whole,) = list_checkpoints(checkpoints)
    bus = train(tiny_model, checkpoints, LearnerConfig(steps=4, checkpoint_every=2), resume_from=whole)
    assert len(bus.metrics()) == 2
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000004"]


def test_a_copy_is_of_everything(training: Training) -> None:
    state = training.state() | {"more": {"scalar": torch.tensor(3.0), "list": [torch.ones(2), 5], "name": "x"}}
    copy = HostCopy()
    taken = copy.take(state)
    more = taken["more"]
    assert (more["scalar"].item(), more["list"][0].tolist(), more["list"][1], more["name"]) == (3.0, [1, 1], 5, "x")
    state["more"]["scalar"].fill_(4.0)
    state["more"]["list"][0].fill_(7.0)
    assert (more["scalar"].item(), more["list"][0].tolist()) == (3.0, [1, 1])
    weight = taken["model"]["model.embed_tokens.weight"]
    assert type(weight) is type(state["model"]["model.embed_tokens.weight"])
    address = weight.to_local().data_ptr()
    again = copy.take(state)
    assert again["model"]["model.embed_tokens.weight"].to_local().data_ptr() == address, "memory is used again"
    assert again["more"]["scalar"].item() == 4.0
