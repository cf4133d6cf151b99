"""Every supported architecture, tiny and random: packed by the learner it says what transformers says unpacked.

That vLLM serves what is published of them: tests/rollout/test_architectures_in_vllm.py.
"""

from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, write_model
from safetensors.numpy import load_file
from test_model import assert_packed_equals_unpacked
from transformers import AutoModelForCausalLM

from learner.model import ModelOptions, build_model, load_causal_lm
from learner.snapshot import Snapshotter


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_model(request.param, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model", CONFIGS, indirect=True)
def test_packed_is_unpacked(model: Path, single_rank: None) -> None:
    assert_packed_equals_unpacked(model)


@pytest.mark.parametrize("model", CONFIGS, indirect=True)
@torch.no_grad()
def test_attention_is_the_models(model: Path) -> None:
    """Windows and soft caps too, as in transformers' plainest attention, which is what vLLM serves."""
    ids = torch.arange(30)[None] % 29 + 3
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(load_causal_lm(model)(ids).logits, plain(ids).logits, atol=1e-5)


@pytest.mark.parametrize("model", CONFIGS, indirect=True)
def test_what_is_published_is_a_checkpoint_of_transformers(model: Path, single_rank: None) -> None:
    """By name and shape: that is what vLLM's own loaders take."""
    policy = build_model(model, ModelOptions())
    snapshot = Snapshotter(policy.causal_lm, "float32", rank=0).take(1)
    assert snapshot is not None
    stored = {name: tensor.shape for name, tensor in load_file(model / "model.safetensors").items()}
    assert {tensor.name: tensor.shape for tensor in snapshot.manifest.tensors} == stored
