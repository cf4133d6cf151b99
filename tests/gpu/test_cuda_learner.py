"""Settings of the learner that only a GPU has, each against the plain step on the same batch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import learner_run, make_groups
from torch import Tensor

from learner.config import LearnerConfig
from learner.run import build_train_step, process_group

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def weights_after_a_step(model: Path, folder: Path, **settings: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Whole weights, in host memory, and the devices of masters and optimizer state."""
    config = LearnerConfig(device="cuda", lr=1e-3, **settings)
    with process_group("cuda", timeout_s=60.0):
        policy, train_step = build_train_step(config, learner_run(model, folder), 0)
        train_step(make_groups(0), 0)
        kept: list[Any] = [*policy.parameters()]
        kept += [state["exp_avg"] for state in train_step.optimizer.state.values()]
        named: Any = policy.causal_lm.named_parameters()
        weights = {name: parameter.full_tensor().detach().cpu() for name, parameter in named}
        return weights, {tensor.to_local().device.type for tensor in kept}


def test_offloaded_state_is_in_host_memory_and_steps_the_same(tiny_model: Path, tmp_path: Path) -> None:
    plain, on_gpu = weights_after_a_step(tiny_model, tmp_path)
    offloaded, on_host = weights_after_a_step(tiny_model, tmp_path, offload=True)
    assert (on_gpu, on_host) == ({"cuda"}, {"cpu"})
    for name, tensor in plain.items():
        assert torch.allclose(tensor, offloaded[name], atol=1e-5), name


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_kernels_keep_packed_sequences_apart(attention: Any, tiny_model: Path, tmp_path: Path) -> None:
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    plain, _ = weights_after_a_step(tiny_model, tmp_path, dtype="bfloat16")
    other, _ = weights_after_a_step(tiny_model, tmp_path, dtype="bfloat16", attention=attention)
    for name, tensor in plain.items():
        # Adam's first step is about the rate, 1e-3, whatever the gradient: only signs of tiny gradients may differ.
        assert (tensor - other[name]).abs().mean() < 1e-4, name
