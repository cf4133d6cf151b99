"""Models whose weights real AdamW steps change, on random tokens."""

import multiprocessing
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

WARM_UP_STEPS = 3
HEAD_DIM = 64


def build(millions: float) -> nn.Module:
    """Qwen3's shape with about so many million parameters."""
    layers = 4 if millions < 50 else 12
    hidden = max(64, round((millions * 1e6 / (layers * 13)) ** 0.5 / 64) * 64)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Training:
    """fp32 masters, AdamW, a small batch of random tokens a step."""

    def __init__(self, millions: float, device: str) -> None:
        self.model = build(millions).to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def warm_up(self, lr: float) -> None:
        for _ in range(WARM_UP_STEPS):
            self.step(lr)

    def step(self, lr: float) -> float:
        """Returns: seconds."""
        began = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        ids = torch.randint(0, 512, (1, 64), device=self.device)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return time.perf_counter() - began


def train_apart(folder: Path, millions: float, rates: list[float], repeats: int) -> None:
    """Leaves in `folder` what `TrainedApart` reads. Gradients and moments go with the process that they are in."""
    process = multiprocessing.get_context("spawn").Process(target=_train_into, args=(folder, millions, rates, repeats))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"training {millions:g} M parameters ended with {process.exitcode}")


def _train_into(folder: Path, millions: float, rates: list[float], repeats: int) -> None:
    training = Training(millions, "cpu")
    version = 0
    torch.save(training.model.state_dict(), folder / f"{version}.pt")
    for rate in rates:
        training.warm_up(rate)
        torch.save(training.model.state_dict(), folder / f"{(version := version + 1)}.pt")
        for _ in range(repeats):
            training.step(rate)
            torch.save(training.model.state_dict(), folder / f"{(version := version + 1)}.pt")


class TrainedApart:
    """A `Training` that is over: each step takes the next version's fp32 weights from its file."""

    def __init__(self, folder: Path, millions: float) -> None:
        self.model = build(millions)
        self._folder = folder
        self._version = -1
        self.warm_up(0.0)

    def warm_up(self, lr: float) -> None:
        self.step(lr)

    def step(self, lr: float) -> float:
        """Returns: seconds, of reading."""
        began = time.perf_counter()
        self._version += 1
        state = torch.load(self._folder / f"{self._version}.pt", mmap=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])
        return time.perf_counter() - began
