"""The whole learner on one, two and four ranks, as processes with the environment of a torchrun job."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learner_script import reshard_main
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from learner.checkpoint import model_tensors
from learner.checkpoint_folder import list_checkpoints, read_trainer_state
from learner.model import load_causal_lm

SETTINGS = ("steps=3", "lr=1e-3", "microbatch_tokens=100", "checkpoint_every=2")
CLOCKS = {
    "learner/step_s",
    "learner/wait_s",
    "learner/publish_s",
    "learner/save_s",
    "learner/tokens_per_s",
    "weights/publish_s",
}


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[..., None], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds NAME.json, metrics, and NAME/, checkpoints, of `one` rank, of `two`, and of runs resumed from theirs."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, ranks, resume_from in (
        ("one", 1, "-"),
        ("two", 2, "-"),
        ("one to two", 2, str(folder / "one/step-000002")),
        ("two to one", 1, str(folder / "two/step-000002")),
        ("two to four", 4, str(folder / "two/step-000002")),
    ):
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


@pytest.mark.parametrize("name", ["one to two", "two to one", "two to four"])
def test_checkpoint_resumes_on_other_ranks(name: str, folder: Path) -> None:
    """The loss says that the weights are the same, the weights after it that the optimizer and the schedule are."""
    assert_same_curve(curve(folder, name), curve(folder, "one")[2:])
    weights_after = [weights(folder / run / "step-000003") for run in (name, "two")]
    assert_close(*weights_after)


@pytest.mark.parametrize("ranks", [1, 4])
def test_resharding_keeps_every_bit(
    ranks: int, folder: Path, run_ranks: Callable[..., None], tiny_model: Path, tmp_path: Path
) -> None:
    """Weights and moments, saved on two ranks, loaded and saved again on others."""
    source = folder / "two" / "step-000002"
    run_ranks(ranks, [str(tiny_model), str(source), str(tmp_path)], reshard_main)
    (resaved,) = list_checkpoints(tmp_path)
    assert len(list(resaved.glob("*.distcp"))) == ranks
    theirs, ours = whole(source), whole(resaved)
    assert ours.keys() == theirs.keys()
    assert {name.rpartition(".")[2] for name in ours if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    for name, tensor in theirs.items():
        assert tensor.any(), name
        assert torch.equal(ours[name], tensor), name


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, read without knowing what that is."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in metadata.items()}  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="is disabled"):
        load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


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
    "apollo": ("optimizer=apollo", "apollo.rank=8", "apollo.update_every=2", "lr=1e-3", "weight_decay=0.1"),
    "lora": ("lora.rank=4", "loss.kl_coef=0.1", "lr=1e-2"),
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


def test_adapters_resume_on_other_ranks(run_ranks: Callable[..., None], tiny_model: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "lora.rank=4", "optimizer=muon")
    for name, ranks, resume_from in (("two", 2, "-"), ("one", 1, str(tmp_path / "two/step-000002"))):
        run_ranks(
            ranks, [str(tiny_model), str(tmp_path / name), str(tmp_path / f"{name}.json"), resume_from, *settings]
        )
    (ours,), (*_, theirs) = curve(tmp_path, "one"), curve(tmp_path, "two")
    for name in ours.keys() - CLOCKS:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), name  # bfloat16
    own, other = (weights(tmp_path / name / "step-000003") for name in ("one", "two"))
    assert all("lora_" in name for name in own)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert torch.allclose(tensor, other[name], atol=2e-4), name


def test_checkpoints_hold_the_same_weights(folder: Path, tiny_model: Path) -> None:
    """Written by two ranks, read by one process."""
    assert read_trainer_state(folder / "two" / "step-000003").world_size == 2
    ours, theirs = (weights(folder / run / "step-000003") for run in ("two", "one"))
    assert_close(ours, theirs)
    initial = model_tensors(load_causal_lm(tiny_model))
    for name, tensor in initial.items():
        assert not torch.equal(tensor, ours[f"model.{name}"]), name


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in whole(checkpoint).items() if name.startswith("model.")}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-3, atol=1e-5), name
