from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import make_groups
from test_checkpoint import state_of, whole
from torch import Tensor, nn
from torch.optim import Muon

from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.config import LearnerConfig
from learner.model import ModelOptions, PolicyModel, build_model, hidden_matrices
from learner.muon import ShardedMuon
from learner.optimizer import build_optimizer, resume_schedule
from learner.train_step import TrainStep

CONFIG = LearnerConfig(steps=8, lr=3e-3, optimizer="muon", schedule="linear", weight_decay=0.1, warmup_steps=1)


def build(model: Path, config: LearnerConfig) -> tuple[PolicyModel, TrainStep, Any, Any]:
    policy = build_model(model, ModelOptions())
    optimizer, scheduler = build_optimizer(policy.parameters(), config, hidden_matrices(policy))
    return policy, TrainStep(policy, optimizer, scheduler, config), optimizer, scheduler


def test_updates_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    gradients = torch.randn(3, 6, 4, generator=generator)
    ours, theirs = (
        updated(kind([parameter], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"), parameter, gradients)
        for kind, parameter in ((ShardedMuon, nn.Parameter(start.clone())), (Muon, nn.Parameter(start.clone())))
    )
    assert not torch.equal(ours, start)
    assert torch.equal(ours, theirs)


def updated(optimizer: Any, parameter: nn.Parameter, gradients: Tensor) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_matrices_of_layers_are_muons_and_the_rest_adamws(single_rank: None, tiny_model: Path) -> None:
    policy, _, optimizer, scheduler = build(tiny_model, CONFIG)
    names = {id(parameter): name for name, parameter in policy.causal_lm.named_parameters()}
    muons, adamws = ([names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups)
    assert len(muons) == 2 * 7 and all("_proj.weight" in name for name in muons)
    assert "model.embed_tokens.weight" in adamws and all("norm" in name or "embed" in name for name in adamws)
    assert [group["lr"] for group in optimizer.param_groups] == [CONFIG.lr / 2] * 2  # one schedule for both
    resume_schedule(scheduler, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([CONFIG.lr * 4 / 7] * 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_lowers_the_loss(optimizer: Any, single_rank: None, tiny_model: Path) -> None:
    """The same batch again and again: what was good grows likelier."""
    config = LearnerConfig(steps=6, lr=1e-3, optimizer=optimizer)
    _, train_step, _, _ = build(tiny_model, config)
    losses = [train_step(make_groups(0), 0)["loss/policy"] for _ in range(6)]
    assert losses[-1] < losses[0] - 1e-3


def test_resumed_run_goes_on_to_the_last_bit(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    policy, train_step, optimizer, _ = build(tiny_model, CONFIG)
    for step in range(2):
        train_step(make_groups(step), step)
    path = write_checkpoint(tmp_path, state_of(2), state_tensors(policy.causal_lm, optimizer), keep=2)
    other, resumed, other_optimizer, scheduler = build(tiny_model, CONFIG)
    load_checkpoint(path, other.causal_lm, other_optimizer)
    resume_schedule(scheduler, 2)
    assert {len(state) for state in other_optimizer.state.values()} == {1, 3}  # momentum; step and two moments
    for taken in (train_step, resumed):
        taken(make_groups(2), 2)
    for own, other_own in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(own), whole(other_own))


def test_what_has_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        build_optimizer([nn.Parameter(torch.ones(2))], CONFIG)
