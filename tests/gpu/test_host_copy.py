"""The state of a learner on a GPU, copied into pinned memory and written from there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.checkpoint_folder import TrainerState
from learner.config import LearnerConfig
from learner.host_copy import HostCopy
from learner.model import ModelOptions, build_model
from learner.optimizer import build_optimizer
from learner.run import process_group

pytestmark = pytest.mark.gpu


def test_checkpoint_of_a_copy_of_what_is_on_the_gpu(tiny_model: Path, tmp_path: Path) -> None:
    def learner() -> tuple[Any, Any]:
        policy = build_model(tiny_model, ModelOptions(device="cuda"))
        return policy, build_optimizer(policy.parameters(), LearnerConfig())[0]

    with process_group("cuda", timeout_s=60.0):
        policy, optimizer = learner()
        live = state_tensors(policy.causal_lm, optimizer)
        before = {name: each.to_local().clone() for name, each in live["model"].items()}
        taken = HostCopy().take(live)
        for each in policy.parameters():
            each.data.mul_(2.0)  # training goes on
        for name, each in taken["model"].items():
            assert each.to_local().is_pinned()
            assert torch.equal(each.to_local(), before[name].cpu())
        state = TrainerState(step=1, model="m", world_size=1, position=None)
        group = torch.distributed.new_group(backend="gloo")
        checkpoint = write_checkpoint(tmp_path, state, taken, keep=1, group=group)
        other, other_optimizer = learner()
        load_checkpoint(checkpoint, other.causal_lm, other_optimizer)
        for name, each in state_tensors(other.causal_lm, other_optimizer)["model"].items():
            assert torch.equal(each.to_local(), before[name])
