"""A model whose distribution over whole completions can be enumerated, and an engine that drafts for it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.config import DraftConfig, RolloutConfig
from rollout.engine.vllm_engine import VllmEngine

NUM_TOKENS = 6
END = 5
PROMPT = (0, 3, 1)
CONFIG = RolloutConfig(context_tokens=64, max_sequences=256)
DRAFT = DraftConfig(policy="logarithmic", max_tokens=4)
DEADLINE_S = 120.0


@dataclass
class Drafting:
    """The engine, the loop that it lives in, and where its model lies."""

    engine: VllmEngine
    runner: asyncio.Runner
    folder: Path

    def run(self, scenario: Any) -> Any:
        return self.runner.run(asyncio.wait_for(scenario, DEADLINE_S))

    def draft_with(self, drafter: str) -> None:
        """A fresh drafter of `stand_in`; it drafts from now on."""
        self.run(self.engine.start_drafting(f"stand_in.{drafter}"))


class EnumerableEngine(VllmEngine):
    """Starts with a stand-in: what is tested here is what vLLM makes of drafts, not whose they are."""

    async def start_drafting(self, drafter: str = "stand_in.PrefixDrafter") -> None:
        await super().start_drafting(drafter)


def write_enumerable_model(folder: Path) -> None:
    """A random Qwen3 of 6 tokens, the last of which ends; its distributions are peaked, and differ by context."""
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.25,
        eos_token_id=END,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=END)
    model.save_pretrained(folder)
    words = {str(token): token for token in range(NUM_TOKENS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), unk_token="0"
    )
    tokenizer.save_pretrained(folder)


def history_of(texts: list[list[int]], version: int = 2) -> tuple[tuple[int, int, bytes], ...]:
    """As a lease brings it."""
    return tuple((version, 0, np.array(text, "<i4").tobytes()) for text in texts)


def past_of(texts: list[list[int]], version: int = 2) -> tuple[tuple[int, np.ndarray], ...]:
    """As a request to the engine brings it."""
    return tuple((version, np.array(text, np.int32)) for text in texts)
