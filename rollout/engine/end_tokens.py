"""Which tokens end a completion."""

from typing import Any


def end_token_ids(model: str) -> list[int]:
    """Ids that end a completion: those of the model's generation settings, else its configuration, and its tokenizer's.

    model: a folder or hub id. Raises: ValueError where there is none: every completion would run to the limit.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config: Any = AutoConfig.from_pretrained(model)
    try:
        end = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the model has no generation settings
        end = None
    if end is None:
        end = getattr(config, "eos_token_id", None)
    ids = set() if end is None else {end} if isinstance(end, int) else set(end)
    tokenizer_end = AutoTokenizer.from_pretrained(model).eos_token_id
    if tokenizer_end is not None:
        ids.add(tokenizer_end)
    if not ids:
        raise ValueError(f"model {model!r} names no end token: set eos_token_id in its config.json")
    return sorted(ids)
