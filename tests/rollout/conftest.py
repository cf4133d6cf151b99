"""Fixtures for rollout tests: snapshots in shared memory, and reference log-probabilities by transformers."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from databus.messages import Manifest, Probe, TensorSpec
from rollout.config import PROBE_TOKENS
from rollout.engine.base import Completion, Snapshot

MakeSnapshot = Callable[..., Snapshot]
Reference = Callable[[Mapping[str, torch.Tensor], tuple[int, ...], Completion, float], np.ndarray]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are quickest on one thread, above all on cores that others use."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_snapshot() -> MakeSnapshot:
    """(weights, version, probe=None) -> a snapshot."""
    return _make_snapshot


def _make_snapshot(weights: Mapping[str, torch.Tensor], version: int, probe: Probe | None = None) -> Snapshot:
    specs: list[TensorSpec] = []
    data = bytearray()
    for name, tensor in weights.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        specs.append(
            TensorSpec(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=len(data),
                num_bytes=len(raw),
                xxh3=xxhash.xxh3_64_intdigest(raw),
            )
        )
        data += raw
    fd = os.memfd_create(f"test-weights-{version}")
    os.write(fd, data)
    manifest = Manifest(version=version, num_bytes=len(data), chunk_bytes=1 << 20, tensors=tuple(specs), probe=probe)
    return Snapshot(version=version, manifest=manifest, fd=fd)


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: Path) -> dict[str, torch.Tensor]:
    """The weights of `tiny_model`, as a learner publishes them: the tied output layer left out."""
    return dict(_load(tiny_model).named_parameters())


@pytest.fixture(scope="session")
def other_weights(tiny_weights: dict[str, torch.Tensor]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Weights that differ from the model's, drawn from a seed."""

    def draw(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).detach()
            for name, tensor in tiny_weights.items()
        }

    return draw


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    """Log-probabilities [t] of a completion under given weights, in one forward pass of transformers, in fp32."""
    model = _load(tiny_model)

    @torch.no_grad()
    def logprobs(
        weights: Mapping[str, torch.Tensor], prompt_ids: tuple[int, ...], completion: Completion, temperature: float
    ) -> np.ndarray:
        ids = torch.tensor([[*prompt_ids, *completion.token_ids.tolist()]])
        logits = torch.func.functional_call(model, dict(weights), (ids,)).logits[0]
        scaled = torch.log_softmax(logits / (temperature or 1.0), -1)
        start = len(prompt_ids)
        return scaled[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0].numpy()

    return logprobs


@pytest.fixture(scope="session")
def make_probe(reference: Reference) -> Callable[[Mapping[str, torch.Tensor]], Probe]:
    """What given weights say of fixed texts."""
    rng = np.random.default_rng(0)
    texts = tuple(tuple(rng.integers(3, 17, length).tolist()) for length in (PROBE_TOKENS, 2, 7, PROBE_TOKENS))

    def probe(weights: Mapping[str, torch.Tensor]) -> Probe:
        return Probe(sequences=texts, logprobs=tuple(tuple(_scored(weights, text)) for text in texts))

    def _scored(weights: Mapping[str, torch.Tensor], text: tuple[int, ...]) -> list[float]:
        ids = np.array(text[1:], np.int32)
        zeros = np.zeros(len(ids))
        whole = Completion(token_ids=ids, logprobs=zeros, versions=zeros, truncated=False)
        return reference(weights, text[:1], whole, 1.0).tolist()

    return probe


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
