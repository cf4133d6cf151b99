"""A checkpoint as a transformers folder, which AutoModelForCausalLM and vLLM load."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from learner.checkpoint import load_tensors, model_tensors
from learner.checkpoint_folder import read_trainer_state, verify_files
from learner.config import LoraConfig
from learner.lora import ADAPTER_NAME, peft_config, target_names
from learner.model import decoder_layers, load_causal_lm

Dtype = Literal["float32", "bfloat16"]
Merge = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(base [out, in], A [rank, in], B [out, rank], scale) -> float32 [out, in]."""

ADAPTER_FOLDER = "adapter"


def export_checkpoint(
    checkpoint_dir: Path, model_source: str | Path, out_dir: Path, dtype: Dtype = "float32", *, merge: Merge
) -> None:
    """Write weights (safetensors), configuration and tokenizer of a checkpoint. One process, no process group.

    Adapters are merged with the model that training began with, and lie beside it as well, in `out_dir/adapter`, as
    peft has them.
    Args: model_source: folder or hub id of the model that training began with: its configuration and tokenizer.
        out_dir: must be empty or not exist. dtype: of the exported weights; float32 are the masters, bit for bit.
        merge: as workers merge.
    Raises: ValueError, in one line, for a missing or damaged checkpoint, an unknown model, or a folder in use.
    """
    state = read_trainer_state(checkpoint_dir)
    verify_files(checkpoint_dir, state)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} is in use: name a folder that is empty or does not exist")
    if state.lora.is_on:
        model = _merged_model(checkpoint_dir, state.lora, model_source, out_dir / ADAPTER_FOLDER, merge)
    else:
        model = _empty_model(model_source)
        load_tensors(checkpoint_dir, {"model": model_tensors(model)}, no_dist=True)
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)
    _copy_tokenizer(model_source, out_dir)


def _empty_model(model_source: str | Path) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(model_source)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"the model {str(model_source)!r} cannot be read: {first_line}") from None
    with suppress(OSError):  # a model without one keeps the default
        model.generation_config = GenerationConfig.from_pretrained(model_source)
    return model


def _merged_model(
    checkpoint_dir: Path, config: LoraConfig, model_source: str | Path, adapter_dir: Path, merge: Merge
) -> PreTrainedModel:
    """Writes the adapter by the way, before it is merged."""
    from peft import get_peft_model

    model = load_causal_lm(model_source)
    names = target_names(model, decoder_layers(model), config.target_modules)
    adapted: Any = get_peft_model(model, peft_config(config, names))
    load_tensors(checkpoint_dir, {"model": model_tensors(adapted.get_base_model())}, no_dist=True)
    adapted.save_pretrained(adapter_dir, save_embedding_layers=False)  # else it asks the hub about the vocabulary
    with torch.no_grad():
        for name in names:
            layer: Any = model.get_submodule(name)
            a, b = (factors[ADAPTER_NAME].weight for factors in (layer.lora_A, layer.lora_B))
            weight = layer.base_layer.weight
            weight.copy_(merge(weight, a, b, config.scale))
    return adapted.unload()


def _copy_tokenizer(model_source: str | Path, out_dir: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer of {str(model_source)!r} cannot be read: {first_line}") from None
    tokenizer.save_pretrained(out_dir)
