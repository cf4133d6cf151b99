"""What the learner publishes of every supported architecture, vLLM serves: it is pulled, loaded in flight under the
names of vLLM's loaders, and gives the log-probabilities that transformers gives with the same weights. So do versions
of which only what has changed is loaded, and what can be read back of them is what was sent, bit for bit.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CONFIGS, write_model
from serve_architectures import PARTS, PROMPT
from transformers import AutoModelForCausalLM

from learner.model import ModelOptions, build_model
from learner.run import process_group
from learner.snapshot import Snapshotter
from learner.weights_out import WeightServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOLERANCE = 1e-4
"""Nats; both sides compute in float32, in another order."""
RANKS = {"qwen3": 2}
"""Served once more with tensor parallelism."""
NAMES = (*CONFIGS, *(f"{name} x{ranks}" for name, ranks in RANKS.items()))
ROOT = Path(__file__).resolve().parents[2]


def folder_of(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A folder for each of `NAMES`: `old` and `new`, two models; what an engine started from the old one and
    updated to the new one said, `said.npz`; and what `serve_architectures` writes of versions applied in part."""
    root = tmp_path_factory.mktemp("architectures")
    servers = []
    jobs = []
    try:
        with process_group("cpu", timeout_s=30.0):
            for served in NAMES:
                name, _, ranks = served.partition(" x")
                folder = root / folder_of(served)
                write_model(name, folder / "old", seed=0)
                write_model(name, folder / "new", seed=1)
                for file in tiny_model.glob("tokenizer*"):
                    (folder / "old" / file.name).write_bytes(file.read_bytes())
                servers.append(WeightServer("ipc://unused", keep=1))
                snapshot = Snapshotter(build_model(folder / "new", ModelOptions()).causal_lm, "float32", rank=0).take(1)
                assert snapshot is not None
                servers[-1].publish(snapshot)
                jobs.append(
                    {
                        "model": str(folder / "old"),
                        "address": servers[-1].address,
                        "num_bytes": snapshot.manifest.num_bytes,
                        "result": str(folder / "said.npz"),
                        "ranks": int(ranks or 1),
                    }
                )
        (root / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("serve_architectures.py")
        subprocess.run(
            [sys.executable, str(script), str(root / "jobs.json")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            timeout=380,
        )
        yield root
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_are_served(results: Path, name: str) -> None:
    folder = results / folder_of(name)
    error = folder / "said.error"
    assert not error.exists(), error.read_text()
    said = np.load(folder / "said.npz")
    old, new = reference(folder / "old"), reference(folder / "new")

    for ids, logprobs, versions in completions(said, "before"):
        assert (versions == 0).all()
        np.testing.assert_allclose(logprobs, old(ids), atol=TOLERANCE)
    for ids, logprobs, versions in completions(said, "after"):
        assert (versions == 1).all()
        np.testing.assert_allclose(logprobs, new(ids), atol=TOLERANCE)
    assert max(np.abs(logprobs - old(ids)).max() for ids, logprobs, _ in completions(said, "after")) > 1000 * TOLERANCE
    mixed = 0
    for ids, logprobs, versions in completions(said, "across"):
        first = versions == versions[0]
        began_with = new if versions[0] else old
        np.testing.assert_allclose(logprobs[first], began_with(ids)[first], atol=TOLERANCE)
        mixed += not first.all()
    assert mixed > 0


@pytest.mark.parametrize("name", NAMES)
def test_versions_in_part_are_served_bit_for_bit(results: Path, name: str) -> None:
    folder = results / folder_of(name)
    experts = {f"model.layers.{layer}.mlp.experts." for layer in range(2)} if "moe" in name else set()
    for part in json.loads((folder / "read.json").read_text()):
        assert not part["wrong"]
        assert 0 < part["changed"] <= part["loaded"] < part["tensors"]
        # Experts lie packed in an order of the kernel's own; what they say is looked at below.
        assert {unread.rsplit(".", 3)[0] + "." for unread in part["unread"]} == experts
    new = shutil.copytree(folder / "new", folder / "parts")
    (folder / "parts.safetensors").rename(new / "model.safetensors")
    said, parts = np.load(folder / "said.npz"), reference(new)
    for ids, logprobs, versions in completions(said, "parts"):
        assert (versions == 1 + PARTS).all()
        np.testing.assert_allclose(logprobs, parts(ids), atol=TOLERANCE)


def completions(said: Any, group: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(token_ids, logprobs, versions), [t] each."""
    ends = np.cumsum(said[f"{group}.lengths"])[:-1]
    columns = [np.split(said[f"{group}.{name}"], ends) for name in ("token_ids", "logprobs", "versions")]
    yield from zip(*columns, strict=True)


def reference(model: Path) -> Any:
    """Log-probabilities [t] of a completion of t tokens by transformers, by its plainest attention, in float32."""
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    @torch.no_grad()
    def logprobs(token_ids: np.ndarray) -> np.ndarray:
        ids = torch.tensor([[*PROMPT, *token_ids.tolist()]])
        said = torch.log_softmax(causal_lm(ids).logits[0], -1)
        return said[len(PROMPT) - 1 : -1].gather(-1, ids[0, len(PROMPT) :, None])[:, 0].numpy()

    return logprobs
