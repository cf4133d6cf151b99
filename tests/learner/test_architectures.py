"""Every supported architecture, tiny and random: packed by the learner it says what transformers says unpacked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from test_model import assert_packed_equals_unpacked
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from learner.model import ModelOptions, build_model
from learner.snapshot import Snapshotter

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8
"""Shorter than the longest sequences: what lies before it must not count, and what lies in another even less."""

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral, windowed": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": GemmaConfig(**SIZES),
    "gemma2, windowed and capped": Gemma2Config(**SIZES, sliding_window=WINDOW, final_logit_softcapping=5.0),
    "gemma3, windowed": Gemma3TextConfig(**SIZES, sliding_window=WINDOW),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("model", CONFIGS, indirect=True)
def test_packed_is_unpacked(model: Path, single_rank: None) -> None:
    assert_packed_equals_unpacked(model)


@pytest.mark.parametrize("model", CONFIGS, indirect=True)
def test_what_is_published_is_a_checkpoint_of_transformers(model: Path, single_rank: None) -> None:
    """By name and shape: that is what vLLM's own loaders take."""
    policy = build_model(model, ModelOptions())
    snapshot = Snapshotter(policy.causal_lm, "float32", rank=0).take(1)
    assert snapshot is not None
    stored = {name: tensor.shape for name, tensor in load_file(model / "model.safetensors").items()}
    assert {tensor.name: tensor.shape for tensor in snapshot.manifest.tensors} == stored
