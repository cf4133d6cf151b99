import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import ScriptedBus, encode_batch, learner_run, make_groups, train

from databus.messages import BatchRequest, PositionRequest, Refused, StepDone, Stop, VersionPublished
from learner import checkpoint_saver
from learner.batch import StalenessViolation
from learner.checkpoint import write_checkpoint
from learner.checkpoint_folder import list_checkpoints, read_trainer_state
from learner.config import LearnerConfig
from learner.run import run_learner

CONFIG = LearnerConfig(steps=4, lr=1e-3, warmup_steps=2, schedule="cosine", checkpoint_every=2, microbatch_tokens=128)
REQUIRED_METRICS = {
    "learner/tokens_per_s",
    "learner/step_s",
    "learner/wait_s",
    "learner/grad_norm",
    "learner/lr",
    "learner/publish_s",
    "learner/save_s",
    "weights/published_bytes",
    "weights/publish_s",
    "learner/num_trainable",
    "learner/num_tokens",
    "loss/policy",
    "loss/entropy",
    "loss/clip_fraction",
    "loss/clip_low_fraction",
    "loss/clip_high_fraction",
    "loss/importance_truncated_fraction",
    "mismatch/kl",
    "mismatch/ess",
    "loss/reference_kl",
    "advantage/zero_groups_fraction",
}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ScriptedBus, Path]:
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    return train(tiny_model, checkpoints, CONFIG), checkpoints


def test_a_step_reports_once_the_version_that_it_trained_is_published(finished: tuple[ScriptedBus, Path]) -> None:
    bus, _ = finished
    told = [(type(message), getattr(message, "step", getattr(message, "version", None))) for message in bus.sent]
    asked = [message for message in told if message[0] is not VersionPublished]
    assert asked == [
        (BatchRequest, 0),
        (StepDone, 0),
        (BatchRequest, 1),
        (StepDone, 1),
        (PositionRequest, 2),
        (BatchRequest, 2),
        (StepDone, 2),
        (BatchRequest, 3),
        (StepDone, 3),
        (PositionRequest, 4),
    ]
    published = [told.index((VersionPublished, version)) for version in range(5)]
    assert published == sorted(published)
    assert published[0] < told.index((BatchRequest, 0)), "the broker gives no lease before"
    for step in range(1, 4):
        assert published[step] < told.index((StepDone, step)), "one version at most is on its way"
    assert bus.closed


def test_metrics_are_complete_and_finite(finished: tuple[ScriptedBus, Path]) -> None:
    bus, _ = finished
    for metrics in bus.metrics():
        by_lag = {name for name in metrics if "_lag" in name}
        assert metrics.keys() - by_lag == REQUIRED_METRICS
        assert "mismatch/kl_lag0" in by_lag
        assert all(math.isfinite(value) for value in metrics.values())
    first = bus.metrics()[0]
    assert first["advantage/zero_groups_fraction"] == 0.25
    assert first["learner/num_tokens"] == sum(
        group.num_tokens + group.size * (len(group.prompt_ids) - 1) for group in make_groups(0)
    ) - sum(_unused_inputs(group) for group in make_groups(0))
    assert [m["learner/lr"] for m in bus.metrics()] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 5e-4])


def _unused_inputs(group: Any) -> int:
    """Inputs of completions without any loss-bearing token: they are not trained on."""
    unused, start = 0, 0
    for length in group.lengths.tolist():
        if not group.loss_mask[start : start + length].any():
            unused += length + len(group.prompt_ids) - 1
        start += length
    return unused


def test_checkpoints_carry_the_position(finished: tuple[ScriptedBus, Path]) -> None:
    _, checkpoints = finished
    states = [read_trainer_state(path) for path in list_checkpoints(checkpoints)]
    assert [state.step for state in states] == [2, 4]
    assert [state.position and state.position.next_cursor for state in states] == [8, 16]


def test_journal_is_kept_for_checkpoints_that_are_not_complete(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker forgets what lies before the oldest checkpoint: it must not hear of one that is being written."""
    complete = threading.Event()

    class Listening(ScriptedBus):
        def send(self, message: Any) -> None:
            super().send(message)
            if isinstance(message, PositionRequest) and message.step == 4:
                complete.set()

    def write_later(*args: Any, **more: Any) -> Path:
        assert complete.wait(30.0)
        return write_checkpoint(*args, **more)

    monkeypatch.setattr(checkpoint_saver, "write_checkpoint", write_later)
    config = LearnerConfig(steps=6, lr=1e-3, checkpoint_every=2, keep_checkpoints=2)
    bus = Listening(config.steps)
    run_learner(config, learner_run(tiny_model, tmp_path), lambda version: bus)
    asked = [message for message in bus.sent if isinstance(message, PositionRequest)]
    assert [(message.step, message.oldest_checkpoint) for message in asked] == [(2, 0), (4, 0), (6, 2)]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000006"]


def test_resumed_run_equals_uninterrupted_bit_for_bit(
    finished: tuple[ScriptedBus, Path], tiny_model: Path, tmp_path: Path
) -> None:
    bus, checkpoints = finished
    resumed = train(tiny_model, tmp_path / "checkpoints", CONFIG, resume_from=list_checkpoints(checkpoints)[0])

    first = resumed.sent[0]
    assert isinstance(first, VersionPublished) and first.version == 2
    exact = REQUIRED_METRICS - {name for name in REQUIRED_METRICS if name.endswith("_s")}
    for ours, theirs in zip(resumed.metrics(), bus.metrics()[2:], strict=True):
        assert {name: ours[name] for name in exact} == {name: theirs[name] for name in exact}
    final, expected = (read_trainer_state(path / "step-000004") for path in (tmp_path / "checkpoints", checkpoints))
    assert [file.xxh3 for file in final.files if file.name.endswith(".distcp")] == [
        file.xxh3 for file in expected.files if file.name.endswith(".distcp")
    ]


def test_resume_beyond_the_last_step_is_refused(
    finished: tuple[ScriptedBus, Path], tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = list_checkpoints(finished[1])[-1]
    with pytest.raises(ValueError, match=r"learner\.steps is 3, but .*step-000004 has taken 4"):
        train(tiny_model, tmp_path, LearnerConfig(steps=3), resume_from=checkpoint)


class StaleBus(ScriptedBus):
    """Cuts a batch that breaks the bound: groups sampled by version 0, three steps later."""

    def send(self, message: Any) -> None:
        if message == BatchRequest(step=3):
            self._answers.append(encode_batch(3, make_groups(0)))
        else:
            super().send(message)


def test_batch_beyond_the_bound_is_not_trained(tiny_model: Path, tmp_path: Path) -> None:
    bus = StaleBus(CONFIG.steps)
    with pytest.raises(StalenessViolation, match="batch 3 has tokens with lags 3 to 3, allowed are 0 to 2"):
        run_learner(CONFIG, learner_run(tiny_model, tmp_path), lambda version: bus)
    assert [message.step for message in bus.sent if isinstance(message, StepDone)] == [0, 1, 2]


class ShortBus(ScriptedBus):
    """Answers the first batch request with one message."""

    def __init__(self, answer: Any) -> None:
        super().__init__(steps=1)
        self._answer = answer

    def send(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, BatchRequest):
            self._answers.append((self._answer, ()))


def test_good_stop_ends_the_learner_quietly(tiny_model: Path, tmp_path: Path) -> None:
    bus = ShortBus(Stop(reason="interrupted"))
    run_learner(CONFIG, learner_run(tiny_model, tmp_path), lambda version: bus)
    assert bus.closed
    assert not torch.distributed.is_initialized()
    assert "weight-server" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Stop(reason="worker-0 died", ok=False), "the run failed: worker-0 died"),
        (Refused(reason="unknown run"), "the broker refused the learner: unknown run"),
    ],
)
def test_first_cause_is_kept(answer: Any, error: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=error):
        run_learner(CONFIG, learner_run(tiny_model, tmp_path), lambda version: ShortBus(answer))


def test_no_batch_within_the_deadline(tiny_model: Path, tmp_path: Path) -> None:
    class SilentBus(ScriptedBus):
        def send(self, message: Any) -> None:
            self.sent.append(message)

    run = learner_run(tiny_model, tmp_path, batch_timeout_s=0.2)
    with pytest.raises(RuntimeError, match=r"no Batch from the broker within 0 s of asking BatchRequest\(step=0\)"):
        run_learner(CONFIG, run, lambda version: SilentBus(1))
