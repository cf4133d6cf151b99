"""The whole learner on one, two and four ranks, as processes with the environment of a torchrun job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import load_tensors, model_tensors
from learner.checkpoint_folder import read_trainer_state
from learner.model import load_causal_lm

SETTINGS = ("steps=3", "lr=1e-3", "microbatch_tokens=100", "checkpoint_every=2")
CLOCKS = {"learner/step_s", "learner/wait_s", "learner/publish_s", "learner/tokens_per_s"}


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[..., None], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds NAME.json, metrics, and NAME/, checkpoints, of: `one` rank; `two`; and `resumed` on two from one's."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, ranks, resume_from in (("one", 1, "-"), ("two", 2, "-"), ("resumed", 2, str(folder / "one/step-000002"))):
        run_ranks(ranks, [str(tiny_model), str(folder / name), str(folder / f"{name}.json"), resume_from, *SETTINGS])
    return folder


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    return json.loads((folder / f"{name}.json").read_text())


def assert_same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for name in own.keys() - CLOCKS:
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_give_the_curve_of_one(folder: Path) -> None:
    """Batches broadcast, sequences balanced, parameters sharded, gradients summed: nothing of it shows."""
    assert len(curve(folder, "one")) == 3
    assert_same_curve(curve(folder, "two"), curve(folder, "one"))


def test_checkpoint_of_one_rank_resumes_on_two(folder: Path) -> None:
    assert_same_curve(curve(folder, "resumed"), curve(folder, "one")[2:])


FORMS = {
    "sequences": ("loss.kind=gspo", "loss.proximal=sampled", "loss.aggregation=sequence", "loss.kl_coef=0.1"),
    "minibatches": (
        "loss.kind=cispo",
        "loss.proximal=recomputed",
        "loss.correction=sequence_mask",
        "loss.importance_cap=20",
        "loss.entropy_coef=0.01",
        "minibatches=2",
        "advantage.estimator=reinforce++",
    ),
    "muon": ("optimizer=muon", "lr=1e-3", "weight_decay=0.1"),
    "reward": ("loss.kl_coef=0.1", "loss.kl_in=reward", "advantage.mask_truncated=true", "microbatch_tokens=30"),
}


@pytest.mark.parametrize("form", FORMS)
def test_four_ranks_give_the_curve_of_one(
    form: str, run_ranks: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    for ranks in (1, 4):
        settings = ("steps=3", "lr=1e-3", "microbatch_tokens=100", *FORMS[form])
        run_ranks(ranks, [str(tiny_model), str(tmp_path / str(ranks)), str(tmp_path / f"{ranks}.json"), "-", *settings])
    assert_same_curve(curve(tmp_path, "4"), curve(tmp_path, "1"))


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_checkpoints_hold_the_same_weights(name: str, folder: Path, tiny_model: Path) -> None:
    """Written by two ranks, read by one process."""
    assert read_trainer_state(folder / name / "step-000003").world_size == 2
    ours, theirs = (weights(folder / run / "step-000003", tiny_model) for run in (name, "one"))
    initial = model_tensors(load_causal_lm(tiny_model))
    for tensor_name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[tensor_name], rtol=1e-3, atol=1e-5), tensor_name
        assert not torch.equal(tensor, initial[tensor_name]), tensor_name


def weights(checkpoint: Path, model: Path) -> dict[str, Any]:
    tensors = model_tensors(load_causal_lm(model))
    load_tensors(checkpoint, {"model": tensors}, no_dist=True)
    return tensors
