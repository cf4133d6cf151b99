from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import export
from learner.config import LearnerConfig
from learner.model import load_causal_lm
from learner.snapshot import Snapshot
from learner.weights_out import WeightServer
from rollout.merging import merge

export_checkpoint = partial(export.export_checkpoint, merge=merge)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Snapshot]:
    """A checkpoint of a one-step run, and the last weights that the learner published."""
    checkpoints = tmp_path_factory.mktemp("export") / "checkpoints"
    published: list[Snapshot] = []
    publish = WeightServer.publish

    def remember(self: WeightServer, snapshot: Snapshot) -> None:
        published.append(snapshot)
        publish(self, snapshot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightServer, "publish", remember)
        train(tiny_model, checkpoints, LearnerConfig(steps=1, lr=1e-2))
    return checkpoints / "step-000001", published[-1]


def test_export_loads_with_the_trained_weights(run: tuple[Path, Snapshot], tiny_model: Path, tmp_path: Path) -> None:
    checkpoint, snapshot = run
    assert not torch.distributed.is_initialized()
    export_checkpoint(checkpoint, tiny_model, tmp_path / "out")

    exported = dict(load_causal_lm(tmp_path / "out").named_parameters())
    initial = dict(load_causal_lm(tiny_model).named_parameters())
    assert exported.keys() == {spec.name for spec in snapshot.manifest.tensors}
    for spec in snapshot.manifest.tensors:
        served = torch.frombuffer(
            bytearray(snapshot.data[spec.offset : spec.offset + spec.num_bytes].tobytes()), dtype=torch.float32
        )
        assert torch.equal(exported[spec.name].flatten(), served), spec.name
        assert not torch.equal(exported[spec.name], initial[spec.name]), spec.name


def test_export_has_a_tokenizer_and_safetensors(run: tuple[Path, Snapshot], tiny_model: Path, tmp_path: Path) -> None:
    export_checkpoint(run[0], tiny_model, tmp_path)  # an empty folder will do
    text = "3+5=8;#8"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, tiny_model))
    assert ours(text).input_ids == theirs(text).input_ids
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "generation_config.json").is_file()


def test_export_in_bfloat16(run: tuple[Path, Snapshot], tiny_model: Path, tmp_path: Path) -> None:
    export_checkpoint(run[0], tiny_model, tmp_path, dtype="bfloat16")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16


def test_folder_in_use_is_refused(run: tuple[Path, Snapshot], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is in use: name a folder that is empty or does not exist"):
        export_checkpoint(run[0], tiny_model, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_model_is_refused(run: tuple[Path, Snapshot], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        export_checkpoint(run[0], tmp_path / "nowhere", tmp_path / "out")
