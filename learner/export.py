"""A checkpoint as a transformers folder, which AutoModelForCausalLM and vLLM load."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from learner.checkpoint import load_tensors, model_tensors
from learner.checkpoint_folder import read_trainer_state, verify_files

Dtype = Literal["float32", "bfloat16"]


def export_checkpoint(checkpoint_dir: Path, model_source: str | Path, out_dir: Path, dtype: Dtype = "float32") -> None:
    """Write weights (safetensors), configuration and tokenizer of a checkpoint. One process, no process group.

    Args: model_source: folder or hub id of the model that training began with: its configuration and tokenizer.
        out_dir: must be empty or not exist. dtype: of the exported weights; float32 are the masters, bit for bit.
    Raises: ValueError, in one line, for a missing or damaged checkpoint, an unknown model, or a folder in use.
    """
    state = read_trainer_state(checkpoint_dir)
    verify_files(checkpoint_dir, state)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} is in use: name a folder that is empty or does not exist")
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


def _copy_tokenizer(model_source: str | Path, out_dir: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_source)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"the tokenizer of {str(model_source)!r} cannot be read: {first_line}") from None
    tokenizer.save_pretrained(out_dir)
