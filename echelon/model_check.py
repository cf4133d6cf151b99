"""Is the model one that can be trained and served? Looks at its configuration and tokenizer, not at its weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echelon.config import RunConfig
from echelon.errors import message_of

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def load_tokenizer(config: RunConfig) -> Any:
    """Raises: ValueError, in one line, where there is none, or it has no chat template and one is asked for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except Exception as error:  # whatever a foreign file makes the library raise
        raise ValueError(f"the tokenizer of model={config.model} cannot be loaded: {message_of(error)}") from error
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):
        # transformers 5 makes an empty tokenizer where it finds no files of one.
        raise ValueError(f"model={config.model} has no tokenizer: expected tokenizer.json or the like beside it")
    if config.data.chat and not tokenizer.chat_template:
        raise ValueError(f"data.chat is true, but the tokenizer of model={config.model} has no chat template")
    return tokenizer


def check_model(config: RunConfig) -> int:
    """The size of the model's vocabulary. Raises: ValueError, in one line, for a model that cannot be used."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = _load_config(config.model)
    if model.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model={config.model} is not a causal language model: its type is {model.model_type!r}")
    _check_weights(config.model)
    text_config = model.get_text_config()
    positions = _positions(text_config)
    if positions is not None and config.rollout.context_tokens > positions:
        raise ValueError(
            f"rollout.context_tokens is {config.rollout.context_tokens}, but model={config.model} has {positions} "
            "positions: lower it"
        )
    return text_config.vocab_size


def model_positions(model: str) -> int | None:
    """Tokens that a prompt and its completion may have together; None where the model does not say.

    Raises: ValueError, in one line, for a model that cannot be loaded.
    """
    return _positions(_load_config(model).get_text_config())


def check_end_tokens(model: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises: ValueError where the model can give none of them: every completion would run to the limit."""
    if min(token_ids) >= vocab_size:
        raise ValueError(
            f"model={model}: its end token is {min(token_ids)}, but its vocabulary ends at {vocab_size - 1}: "
            "tokenizer and model do not belong together"
        )


def check_devices(config: RunConfig) -> None:
    """Raises: ValueError where a GPU is asked for and torch sees none, or too few."""
    import torch

    for key, device in (("rollout.device", config.rollout.device), ("learner.device", config.learner.device)):
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{key} is cuda, but torch sees no GPU here: set it to cpu, or `make setup GPU=1`")
    num_gpus = torch.cuda.device_count()
    if config.learner.device == "cuda" and config.learner.ranks > num_gpus:
        raise ValueError(f"learner.ranks is {config.learner.ranks}, but there are {num_gpus} GPUs here")


def check_adapters(config: RunConfig) -> None:
    """Raises: ValueError, in one line, for `learner.lora.target_modules` that this model cannot have, or weights that
    workers cannot merge an adapter with."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from learner.lora import target_names
    from learner.model import decoder_layers
    from rollout.base_weights import weight_files

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model))
    target_names(skeleton, decoder_layers(skeleton), config.learner.lora.target_modules)
    weight_files(config.model)


def _check_weights(model: str) -> None:
    folder = Path(model)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise ValueError(f"model={model} has no weights: expected {' or '.join(WEIGHT_PATTERNS)} in it")


def _load_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # whatever a foreign file makes the library raise
        raise ValueError(f"model={model} cannot be loaded: {message_of(error)}") from error


def _positions(text_config: Any) -> int | None:
    rope = getattr(text_config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"  # then the limit is another one
    return None if scaled else getattr(text_config, "max_position_embeddings", None)
