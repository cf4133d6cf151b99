"""What the learner's benchmark trains: a small model made from its config, and long-tailed completions."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from databus.codec import Array
from databus.groups import Group

PAD, EOS = 0, 1
SPECIAL_TOKENS = 2


def write_model(folder: Path, *, vocabulary: int, hidden: int, layers: int) -> int:
    """A random Qwen3 in fp32 with a tokenizer of as many words, which TRL wants. Returns: number of parameters."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1").save_pretrained(folder)
    return model.num_parameters()


def long_tailed_lengths(count: int, median: int, longest: int) -> Array:
    """Quantiles of a log-normal distribution, the last of which is `longest`; int32 [count], ascending."""
    normal = NormalDist()
    points = np.array([normal.inv_cdf((index + 0.5) / count) for index in range(count)])
    lengths = median * np.exp(points * np.log(longest / median) / points[-1])
    return np.maximum(1, np.round(lengths)).astype(np.int32)


def make_groups(lengths: Array, *, group_size: int, prompt_tokens: int, vocabulary: int, seed: int = 0) -> list[Group]:
    """Groups of on-policy completions, the lengths shuffled over them; half of each group's are right."""
    rng = np.random.default_rng(seed)
    shares = rng.permutation(lengths).reshape(-1, group_size)
    return [_make_group(rng, share, prompt_tokens, vocabulary) for share in shares]


def _make_group(rng: np.random.Generator, lengths: Array, prompt_tokens: int, vocabulary: int) -> Group:
    num_tokens = int(lengths.sum())
    return Group(
        prompt_ids=rng.integers(SPECIAL_TOKENS, vocabulary, prompt_tokens).astype(np.int32),
        lengths=lengths.astype(np.int32),
        token_ids=rng.integers(SPECIAL_TOKENS, vocabulary, num_tokens).astype(np.int32),
        logprobs=np.full(num_tokens, -np.log(vocabulary), np.float32),
        loss_mask=np.ones(num_tokens, np.uint8),
        version_values=np.zeros(1, np.int32),
        version_lengths=np.full(1, num_tokens, np.int32),
        rewards=(np.arange(len(lengths)) % 2).astype(np.float32),
        reward_parts=np.zeros((len(lengths), 0), np.float32),
        truncated=np.zeros(len(lengths), np.uint8),
    )


def num_inputs(groups: list[Group]) -> int:
    """Positions of a forward pass without padding: prompts and completions, less the last token of each."""
    return sum(group.num_tokens + group.size * (len(group.prompt_ids) - 1) for group in groups)
