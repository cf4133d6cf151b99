"""What is published with a version is what its weights say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_script import ScriptedBus, learner_run
from transformers import AutoModelForCausalLM

from databus.messages import Probe
from learner.config import LearnerConfig
from learner.model import ModelOptions, build_model
from learner.probe import score_probe
from learner.run import run_learner
from learner.snapshot import Snapshot
from learner.weights_out import WeightServer

TEXTS = ((3, 9, 4, 14, 7), (5, 13), tuple(3 + index * 5 % 14 for index in range(64)))
CONFIG = LearnerConfig(steps=2, lr=1e-2, microbatch_tokens=32)


@torch.no_grad()
def expected(model: Any, texts: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """By transformers, a text at a time."""
    scored = []
    for text in texts:
        ids = torch.tensor([text])
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        scored.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].numpy())
    return scored


def assert_equal(probe: Probe, scored: list[np.ndarray]) -> None:
    assert probe.sequences == TEXTS
    for ours, theirs in zip(probe.logprobs, scored, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_the_models_own_at_any_temperature(
    tiny_model: Path, single_rank: None, temperature: float
) -> None:
    policy = build_model(tiny_model, ModelOptions(temperature=temperature))
    assert_equal(score_probe(policy, TEXTS, 32), expected(AutoModelForCausalLM.from_pretrained(tiny_model), TEXTS))
    assert policy.temperature == temperature


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Snapshot]]:
    snapshots: list[Snapshot] = []
    publish = WeightServer.publish

    def remember(server: WeightServer, snapshot: Snapshot) -> None:
        snapshots.append(snapshot)
        publish(server, snapshot)

    monkeypatch.setattr(WeightServer, "publish", remember)
    yield snapshots


def weights_of(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.from_numpy(snapshot.data[spec.offset : spec.offset + spec.num_bytes].copy())
        .view(torch.float32)
        .view(spec.shape)
        for spec in snapshot.manifest.tensors
    }


def test_every_version_says_what_its_own_weights_say(
    tiny_model: Path, tmp_path: Path, published: list[Snapshot]
) -> None:
    run = learner_run(tiny_model, tmp_path / "checkpoints", probe=TEXTS, temperature=0.7)
    run_learner(CONFIG, run, lambda version: ScriptedBus(CONFIG.steps))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert [snapshot.manifest.version for snapshot in published] == [0, 1, 2]
    for snapshot in published:
        assert not model.load_state_dict(weights_of(snapshot), strict=False).unexpected_keys
        assert snapshot.manifest.probe is not None
        assert_equal(snapshot.manifest.probe, expected(model, TEXTS))
    first, last = (each.manifest.probe for each in (published[0], published[-1]))
    assert first is not None and last is not None
    assert np.abs(np.subtract(first.logprobs[0], last.logprobs[0])).max() > 1e-3


def test_without_texts_nothing_is_scored(tiny_model: Path, tmp_path: Path, published: list[Snapshot]) -> None:
    run_learner(CONFIG, learner_run(tiny_model, tmp_path), lambda version: ScriptedBus(CONFIG.steps))
    assert all(snapshot.manifest.probe is None for snapshot in published)
