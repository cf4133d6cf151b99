"""State that leaves the device for a while comes back to the bit. Here the device is the CPU, for both places."""

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import learner_run, make_groups
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.checkpoint import state_tensors
from learner.config import LearnerConfig, LossConfig
from learner.off_turn import HostState, state_of
from learner.run import build_train_step, process_group


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for each in value.values() for leaf in leaves(each)] if isinstance(value, dict) else []


def bits(tensors: dict[str, Any]) -> list[bytes]:
    """Of copies: memory that numpy has seen cannot be resized any more."""
    copies = [_whole(leaf).detach().reshape(-1).clone() for leaf in leaves(tensors)]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in copies]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


KL = LossConfig(kl_coef=0.1)
CONFIGS = {
    "adamw": LearnerConfig(lr=1e-2),
    "muon": LearnerConfig(lr=1e-2, optimizer="muon"),
    "a reference model": LearnerConfig(lr=1e-2, loss=KL),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_are_the_same_with_turns_between_them(tiny_model: Path, tmp_path: Path, config: LearnerConfig) -> None:
    outcomes = []
    for away in (False, True):
        with process_group("cpu", timeout_s=60.0):
            policy, train_step = build_train_step(config, learner_run(tiny_model, tmp_path), 0)
            models = [policy, *train_step.frozen_models]
            host = HostState(state_of("all", models, train_step.optimizer), "cpu")
            metrics = []
            for step in range(3):
                # Either way: the first time, torch takes a step of rate 0 to have any state of an optimizer.
                before = bits(state_tensors(policy.causal_lm, train_step.optimizer))
                if away:
                    held = [parameter.to_local() for parameter in policy.parameters()]
                    host.to_host()
                    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in held)
                    assert host.num_bytes >= sum(tensor.nbytes for tensor in held)
                    host.to_device()
                    assert bits(state_tensors(policy.causal_lm, train_step.optimizer)) == before
                metrics.append(train_step(make_groups(step), step))
            outcomes.append((metrics, bits(state_tensors(policy.causal_lm, train_step.optimizer))))
    assert outcomes[0] == outcomes[1]


def test_optimizer_state_alone(tiny_model: Path, tmp_path: Path) -> None:
    with process_group("cpu", timeout_s=60.0):
        policy, train_step = build_train_step(LearnerConfig(lr=1e-2), learner_run(tiny_model, tmp_path), 0)
        train_step(make_groups(0), 0)
        host = HostState(state_of("optimizer", [policy], train_step.optimizer), "cpu")
        host.to_host()
        weights = [parameter.to_local() for parameter in policy.parameters()]
        moments = [state["exp_avg"].to_local() for state in train_step.optimizer.state.values()]
        assert all(tensor.untyped_storage().nbytes() for tensor in weights)
        assert not any(tensor.untyped_storage().nbytes() for tensor in moments)
        host.to_device()
        train_step(make_groups(1), 1)


def test_views_and_ties_are_moved_once_and_buffers_used_again() -> None:
    base = torch.arange(12.0)
    view, other = base[3:7], torch.ones(12)
    host = HostState(lambda: [base, view, other], "cpu")
    for _ in range(3):
        host.to_host()
        assert host.num_bytes == base.nbytes + other.nbytes
        buffers = {buffer.data_ptr() for _, buffer in host._moved}
        host.to_device()
        assert view.tolist() == [3, 4, 5, 6] and other.sum() == 12
        view += 0.0
    host.to_host()
    assert {buffer.data_ptr() for _, buffer in host._moved} == buffers
    host.to_device()


def test_what_lies_elsewhere_stays() -> None:
    tensor = torch.ones(3)
    host = HostState(lambda: [tensor], "cuda:none")
    assert list(host._storages()) == []
