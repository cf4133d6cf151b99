from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_script import make_groups
from torch import Tensor

from databus.groups import Group
from learner.config import LearnerConfig
from learner.losses import policy_loss
from learner.model import ModelOptions, build_model, load_causal_lm
from learner.optimizer import build_optimizer
from learner.packing import sequences_of
from learner.train_step import TrainStep

CONFIG = LearnerConfig(steps=3, lr=1e-3, max_grad_norm=1e9)


def step_gradients(model: Path, config: LearnerConfig, groups: list[Group]) -> tuple[dict[str, float], Any]:
    """Metrics and whole gradients of one step."""
    policy = build_model(model, ModelOptions())
    optimizer, scheduler = build_optimizer(policy.parameters(), config)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        for name, parameter in policy.causal_lm.named_parameters():
            grad: Any = parameter.grad
            gradients[name] = grad.full_tensor().clone()

    optimizer.register_step_pre_hook(keep_gradients)
    return TrainStep(policy, optimizer, scheduler, config)(groups, 0), gradients


def naive_gradients(model: Path, groups: list[Group]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over all tokens of the batch by plain transformers, one sequence at a time, without packing."""
    plain = load_causal_lm(model)
    sequences = sequences_of(groups, scale_rewards=True)
    losses = []
    for sequence in sequences:
        logits = plain(torch.from_numpy(sequence.token_ids[None, :-1])).logits[0]
        logprobs = logits.log_softmax(-1)[torch.from_numpy(sequence.targets - 1)]
        own = logprobs.gather(1, torch.from_numpy(sequence.token_ids[sequence.targets])[:, None])[:, 0]
        mask = torch.ones(len(own), dtype=torch.bool)
        advantages = torch.full((len(own),), sequence.advantage)
        sampled = torch.from_numpy(sequence.logprobs)
        losses.append(policy_loss(own, sampled, advantages, mask, torch.zeros_like(mask).long(), CONFIG.loss)[0])
    loss = torch.stack(losses).sum() / sum(len(sequence.targets) for sequence in sequences)
    loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("microbatch_tokens", [1, 40, 4096])
def test_gradient_does_not_depend_on_microbatches(microbatch_tokens: int, single_rank: None, tiny_model: Path) -> None:
    groups = make_groups(0)
    loss, expected = naive_gradients(tiny_model, groups)
    config = msgspec.structs.replace(CONFIG, microbatch_tokens=microbatch_tokens)
    metrics, gradients = step_gradients(tiny_model, config, groups)
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_forced_tokens_bear_no_loss_whatever_their_logprob(single_rank: None, tiny_model: Path) -> None:
    """The end of thinking that a worker forces is context for what follows, and nothing else."""
    forced = completions_with_a_forced_token(logprob=0.0)
    metrics, gradients = step_gradients(tiny_model, CONFIG, forced)
    same, same_gradients = step_gradients(tiny_model, CONFIG, completions_with_a_forced_token(logprob=-7.5))
    assert {**same, "learner/grad_norm": metrics["learner/grad_norm"]} == metrics
    assert same["learner/grad_norm"] == metrics["learner/grad_norm"] > 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
    loss, expected = naive_gradients(tiny_model, forced)
    assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name
    all_sampled = [replace(group, loss_mask=np.ones_like(group.loss_mask)) for group in forced]
    assert step_gradients(tiny_model, CONFIG, all_sampled)[0]["loss/policy"] != metrics["loss/policy"]


def completions_with_a_forced_token(logprob: float) -> list[Group]:
    """Every second token of each completion was forced."""
    groups: list[Group] = []
    for group in make_groups(0):
        mask = np.concatenate([np.arange(length) % 2 == 0 for length in group.lengths])
        logprobs = np.where(mask, group.logprobs, np.float32(logprob)).astype(np.float32)
        groups.append(replace(group, loss_mask=mask.astype(np.uint8), logprobs=logprobs))
    return groups


def test_groups_without_signal_change_nothing_but_the_count(single_rank: None, tiny_model: Path) -> None:
    """A group with equal rewards has no gradient; its tokens still count in the mean."""
    groups = make_groups(0)
    metrics, gradients = step_gradients(tiny_model, CONFIG, groups)
    metrics_without, gradients_without = step_gradients(tiny_model, CONFIG, groups[:-1])
    kept = sum(int(group.loss_mask.sum()) for group in groups[:-1])
    share = kept / (kept + int(groups[-1].loss_mask.sum()))
    assert metrics["advantage/zero_groups_fraction"] == 0.25
    assert metrics["loss/policy"] == pytest.approx(share * metrics_without["loss/policy"], rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, share * gradients_without[name], rtol=1e-4, atol=1e-7), name


def test_batch_without_any_signal_is_a_step_of_zero_gradient(single_rank: None, tiny_model: Path) -> None:
    metrics, gradients = step_gradients(tiny_model, CONFIG, make_groups(0)[-1:])
    assert metrics["learner/grad_norm"] == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_forward_only_passes_see_the_newest_weights(single_rank: None, tiny_model: Path) -> None:
    """FSDP keeps the root whole after a pass without a backward; the next step must not read that copy."""
    policy = build_model(tiny_model, ModelOptions())
    optimizer, scheduler = build_optimizer(policy.parameters(), LearnerConfig(lr=0.05))
    train_step = TrainStep(policy, optimizer, scheduler, CONFIG)
    before = train_step(make_groups(0), 0)
    after = train_step(make_groups(0), 0)

    fresh = build_model(tiny_model, ModelOptions())
    fresh.load_state_dict(policy.state_dict())
    again = TrainStep(fresh, *build_optimizer(fresh.parameters(), CONFIG), CONFIG)(make_groups(0), 0)
    assert again["loss/policy"] != pytest.approx(after["loss/policy"], rel=1e-6)
    third = train_step(make_groups(0), 0)
    assert third["loss/policy"] == again["loss/policy"]
    assert third["mismatch/kl"] == again["mismatch/kl"] != before["mismatch/kl"]


def test_not_finite_is_refused_before_anything_changes(single_rank: None, tiny_model: Path) -> None:
    policy = build_model(tiny_model, ModelOptions())
    optimizer, scheduler = build_optimizer(policy.parameters(), CONFIG)
    with torch.no_grad():
        norm: Any = policy.causal_lm.base_model.norm
        norm.weight.fill_(float("nan"))
    before = {name: tensor.full_tensor().clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match="step 0 not taken: loss nan, gradient norm nan"):
        TrainStep(policy, optimizer, scheduler, CONFIG)(make_groups(0), 0)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor.full_tensor().nan_to_num(), before[name].nan_to_num()), name
    assert not optimizer.state
