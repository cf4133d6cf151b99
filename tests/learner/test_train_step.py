from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learner_script import make_groups
from torch import Tensor

from databus.groups import Group
from learner.advantages import estimate_advantages
from learner.config import AdvantageConfig, LearnerConfig, LossConfig
from learner.losses import LossTokens, policy_loss
from learner.model import ModelOptions, build_model, load_causal_lm
from learner.optimizer import build_optimizer
from learner.packing import plan_microbatches
from learner.reference import build_reference, penalised
from learner.sequences import Sequence, sequences_of, weighted, with_advantages
from learner.train_step import TrainStep

CONFIG = LearnerConfig(steps=3, lr=1e-3, max_grad_norm=1e9)
LOSSES = {
    "ppo": LossConfig(),
    "gspo": LossConfig(kind="gspo", proximal="sampled", aggregation="sequence", dual_clip=3.0),
    "cispo": LossConfig(kind="cispo", proximal="sampled", aggregation="fixed", fixed_tokens=24),
    "masked": LossConfig(kind="reinforce", correction="geometric_mask", importance_low=0.02, importance_cap=0.2),
    "regularised": LossConfig(correction="sequence_tis", kl_coef=0.2, entropy_coef=0.05, aggregation="sequence"),
    "kl_in_reward": LossConfig(kl_coef=0.2, kl_in="reward", kl_estimator="k1"),
}


def with_loss(loss: LossConfig, **changes: Any) -> LearnerConfig:
    return msgspec.structs.replace(CONFIG, loss=loss, **changes)


def step_gradients(
    model: Path, config: LearnerConfig, groups: list[Group], reference: Path | None = None, **more: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and whole gradients of one step, of its last minibatch."""
    policy = build_model(model, ModelOptions())
    frozen = build_reference(str(reference), ModelOptions()) if reference else None
    optimizer, scheduler = build_optimizer(policy.parameters(), config)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        for name, parameter in policy.causal_lm.named_parameters():
            grad: Any = parameter.grad
            gradients[name] = grad.full_tensor().clone()

    optimizer.register_step_pre_hook(keep_gradients)
    return TrainStep(policy, optimizer, scheduler, config, frozen, **more)(groups, 0), gradients


def plain_logprobs(model: Any, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by plain transformers, one sequence at a time, without packing."""
    logits = model(torch.from_numpy(sequence.token_ids[None, :-1])).logits[0]
    log_softmax = logits.log_softmax(-1)[torch.from_numpy(sequence.targets - 1)]
    targets = torch.from_numpy(sequence.token_ids[sequence.targets])
    return log_softmax.gather(1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)


def naive_gradients(
    model: Path, groups: list[Group], config: LearnerConfig = CONFIG, reference: Path | None = None
) -> tuple[float, dict[str, Tensor]]:
    """The policy's part of the batch's loss, and the gradient of the whole loss, sequence by sequence."""
    plain = load_causal_lm(model)
    sequences = sequences_of(groups, 0)
    if reference is not None:
        frozen = load_causal_lm(reference)
        with torch.no_grad():
            sequences = [replace(s, reference=plain_logprobs(frozen, s)[0].numpy()) for s in sequences]
        if config.loss.kl_in == "reward":
            groups = penalised(groups, sequences, config.loss)
    sequences = with_advantages(sequences, groups, estimate_advantages(groups, "grpo"))
    losses, policy = [], 0.0
    for sequence in weighted(sequences, config.loss):
        own, entropy = plain_logprobs(plain, sequence)
        count = len(sequence.targets)
        tokens = LossTokens(
            sampled=torch.from_numpy(sequence.logprobs),
            advantages=torch.from_numpy(sequence.advantages),
            weights=torch.full((count,), sequence.weight),
            owners=torch.zeros(count, dtype=torch.int64),
            lags=torch.zeros(count, dtype=torch.int64),
            num_sequences=1,
            reference=None if sequence.reference is None else torch.from_numpy(sequence.reference),
        )
        loss, sums = policy_loss(own, entropy, tokens, config.loss)
        losses.append(loss)
        policy += sums.metrics()["loss/policy"]
    torch.stack(losses).sum().backward()
    return policy, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(gradient.any() for gradient in theirs.values())
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("microbatch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_does_not_depend_on_microbatches(
    loss: str, microbatch_tokens: int, single_rank: None, tiny_model: Path, other_model: Path
) -> None:
    groups = make_groups(0)
    config = with_loss(LOSSES[loss], microbatch_tokens=microbatch_tokens)
    reference = other_model if config.loss.kl_coef else None
    policy, expected = naive_gradients(tiny_model, groups, config, reference)
    metrics, gradients = step_gradients(tiny_model, config, groups, reference)
    assert metrics["loss/policy"] == pytest.approx(policy, rel=1e-4, abs=1e-7)
    assert (metrics["loss/reference_kl"] != 0) == (reference is not None)
    assert_same_gradients(gradients, expected)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, Tensor]:
    return naive_gradients(tiny_model, make_groups(0), with_loss(LOSSES["gspo"]))[1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.sampled_from([1, 2, 4]), max_tokens=st.integers(1, 300), seed=st.integers(0, 999))
def test_gradient_does_not_depend_on_the_split(
    ranks: int, max_tokens: int, seed: int, expected: dict[str, Tensor], single_rank: None, tiny_model: Path
) -> None:
    """All that 1, 2 or 4 ranks would do, for sequences in any order, added up in this process."""
    config = LOSSES["gspo"]
    policy = build_model(tiny_model, ModelOptions())
    groups = make_groups(0)
    sequences = with_advantages(sequences_of(groups, 0), groups, estimate_advantages(groups, "grpo"))
    sequences = weighted(sequences, config)
    np.random.default_rng(seed).shuffle(sequences)  # type: ignore[arg-type]
    for rank in range(ranks):
        for part in plan_microbatches(sequences, rank, ranks, max_tokens, policy.attention_tokens):
            logprobs, entropy = policy(part.input_ids, part.position_ids, part.loss_positions, part.targets)
            policy_loss(logprobs, entropy, part.tokens, config)[0].backward()
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in policy.causal_lm.named_parameters()}
    assert_same_gradients({name: gradient.full_tensor() for name, gradient in gradients.items()}, expected)


def test_gradient_does_not_depend_on_order(single_rank: None, tiny_model: Path) -> None:
    config = with_loss(LOSSES["gspo"], microbatch_tokens=40)
    _, forwards = step_gradients(tiny_model, config, make_groups(0))
    _, backwards = step_gradients(tiny_model, config, make_groups(0)[::-1])
    assert_same_gradients(forwards, backwards)


def test_the_initial_model_is_no_distance_from_itself(single_rank: None, tiny_model: Path) -> None:
    config = with_loss(LossConfig(kl_coef=0.2))
    metrics, gradients = step_gradients(tiny_model, config, make_groups(0), tiny_model)
    assert metrics["loss/reference_kl"] == pytest.approx(0, abs=1e-9)
    assert_same_gradients(gradients, step_gradients(tiny_model, CONFIG, make_groups(0))[1])


def test_recomputed_is_where_the_batch_began(single_rank: None, tiny_model: Path) -> None:
    """With one minibatch it is `current`; with two, the second one's ratio is no longer 1, and its clip counts."""
    recomputed, current = LossConfig(proximal="recomputed", clip_low=1e-6, clip_high=1e-6), LossConfig()
    groups = make_groups(0)
    one = [step_gradients(tiny_model, with_loss(loss), groups)[1] for loss in (recomputed, current)]
    assert_same_gradients(*one)
    metrics, _ = step_gradients(tiny_model, with_loss(recomputed, minibatches=2), groups)
    assert 0 < metrics["loss/clip_fraction"] < 0.5
    assert step_gradients(tiny_model, with_loss(current, minibatches=2), groups)[0]["loss/clip_fraction"] == 0


def test_a_step_has_an_update_a_minibatch(single_rank: None, tiny_model: Path) -> None:
    policy = build_model(tiny_model, ModelOptions())
    config = with_loss(LossConfig(), minibatches=3)
    optimizer, scheduler = build_optimizer(policy.parameters(), config)
    updates: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: updates.append(1))
    metrics = TrainStep(policy, optimizer, scheduler, config)(make_groups(0), 0)
    assert len(updates) == 3
    assert scheduler.last_epoch == 1
    assert metrics["learner/num_tokens"] == step_gradients(tiny_model, CONFIG, make_groups(0))[0]["learner/num_tokens"]


def test_truncated_completions_bear_no_loss(single_rank: None, tiny_model: Path) -> None:
    groups = [replace(group, truncated=np.array([1, 0, 0, 0], np.uint8)) for group in make_groups(0)]
    masks = [np.where(np.arange(group.num_tokens) < group.lengths[0], 0, group.loss_mask) for group in groups]
    masked = [replace(group, loss_mask=mask.astype(np.uint8)) for group, mask in zip(groups, masks, strict=True)]
    config = msgspec.structs.replace(CONFIG, advantage=AdvantageConfig(mask_truncated=True))
    _, gradients = step_gradients(tiny_model, config, groups)
    assert_same_gradients(gradients, step_gradients(tiny_model, CONFIG, masked)[1])


def test_a_function_of_ones_own(single_rank: None, tiny_model: Path) -> None:
    groups = make_groups(0)
    by_token = step_gradients(
        tiny_model,
        CONFIG,
        groups,
        advantage_function=lambda group: np.repeat(group.rewards - group.rewards.mean(), group.lengths),
    )
    config = msgspec.structs.replace(CONFIG, advantage=AdvantageConfig(estimator="dr_grpo"))
    assert_same_gradients(by_token[1], step_gradients(tiny_model, config, groups)[1])


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
    assert_same_gradients(gradients, expected)
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
