from pathlib import Path

import pytest
import torch
from apollo_torch import APOLLOAdamW
from learner_script import make_groups
from test_checkpoint import state_of
from test_checkpoint import whole as gathered
from test_muon import build
from torch import Tensor, nn

from learner.apollo import ShardedApollo
from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.config import ApolloConfig, LearnerConfig
from learner.optimizer import resume_schedule

APOLLO = ApolloConfig(rank=8, update_every=3)
CONFIG = LearnerConfig(steps=8, lr=3e-3, optimizer="apollo", schedule="linear", weight_decay=0.1, apollo=APOLLO)
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}


def start_and_gradients() -> tuple[list[Tensor], Tensor]:
    """Two matrices, wide and tall, and 8 gradients of each."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 4, generator=generator), torch.randn(3, 7, generator=generator)]
    return start, torch.randn(8, 21 + 3, generator=generator)


def updated(optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter], gradients: Tensor) -> list[Tensor]:
    for row in gradients:
        for matrix in matrices:
            matrix.grad = row[: matrix.numel()].view_as(matrix).clone()
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


@pytest.mark.parametrize("scale_by", ["channel", "tensor"])
def test_updates_are_those_of_the_library(scale_by: str) -> None:
    """Over three projections."""
    config = ApolloConfig(rank=2, update_every=3, scale_by=scale_by, scale=4.0)  # type: ignore[arg-type]
    start, gradients = start_and_gradients()
    ours = [nn.Parameter(each.clone()) for each in start]
    theirs = [nn.Parameter(each.clone()) for each in start]
    projection = {"rank": 2, "update_proj_gap": 3, "scale_type": scale_by, "scale": 4.0}
    library = APOLLOAdamW([{"params": theirs, "proj": "random", "proj_type": "std", **projection}], **SETTINGS)
    own = updated(ShardedApollo(ours, config=config, **SETTINGS), ours, gradients)
    for mine, other, before in zip(own, updated(library, theirs, gradients), start, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, before)


def test_moments_are_of_the_projection(single_rank: None, tiny_model: Path) -> None:
    policy, train_step, optimizer, _ = build(tiny_model, CONFIG)
    train_step(make_groups(0), 0)
    matrices = optimizer.param_groups[0]["params"]
    assert len(matrices) == 2 * 7
    for matrix in matrices:
        assert optimizer.state[matrix]["exp_avg"].numel() == APOLLO.rank * max(matrix.shape)
    other_names = {name for name, each in policy.causal_lm.named_parameters() if not any(each is m for m in matrices)}
    assert "model.embed_tokens.weight" in other_names and all("norm" in n or "embed" in n for n in other_names)


def test_lowers_the_loss(single_rank: None, tiny_model: Path) -> None:
    """The same batch again and again: what was good grows likelier."""
    _, train_step, _, _ = build(tiny_model, LearnerConfig(steps=6, lr=1e-3, optimizer="apollo", apollo=APOLLO))
    losses = [train_step(make_groups(0), 0)["loss/policy"] for _ in range(6)]
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("saved_after", [2, 3])
def test_resumed_run_goes_on_to_the_last_bit(
    saved_after: int, single_rank: None, tiny_model: Path, tmp_path: Path
) -> None:
    """Within a projection, and where the next one is due."""
    policy, train_step, optimizer, _ = build(tiny_model, CONFIG)
    for step in range(saved_after):
        train_step(make_groups(step), step)
    path = write_checkpoint(tmp_path, state_of(saved_after), state_tensors(policy.causal_lm, optimizer), keep=2)
    other, resumed, other_optimizer, scheduler = build(tiny_model, CONFIG)
    load_checkpoint(path, other.causal_lm, other_optimizer)
    resume_schedule(scheduler, saved_after)
    for step in range(saved_after, saved_after + 3):
        for taken in (train_step, resumed):
            taken(make_groups(step), step)
    for own, other_own in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(gathered(own), gathered(other_own))


def test_a_checkpoint_before_the_first_step_leaves_it_as_it_is(single_rank: None, tiny_model: Path) -> None:
    """Whoever asks for the state of an optimizer that has none yet has torch take a step without gradients."""
    runs = [build(tiny_model, CONFIG) for _ in range(2)]
    state_tensors(runs[0][0].causal_lm, runs[0][2])
    for _, train_step, _, _ in runs:
        train_step(make_groups(0), 0)
    first, second = (
        max(state["scaled_grad"] for state in run[2].state.values() if "scaled_grad" in state) for run in runs
    )
    assert first == pytest.approx(float(second), rel=1e-4)
