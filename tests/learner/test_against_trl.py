"""Losses, corrections and advantages against TRL's own code, called on a trainer that was never constructed.

TRL's `_generate_and_score_completions` makes its padded batch (advantages, truncation masks, importance ratios) from
stubbed completions and rewards, and its `_compute_loss` the loss. Ours packs the same completions, in several
micro-batches. Both start from the same logits; loss and gradient of the logits have to agree within 1e-5.

Where definitions differ, and how that is bridged here:
- TRL adds 1e-4 to deviations (`trl/trainer/grpo_trainer.py`), ours 1e-6 (`learner.advantages.EPS`): given here.
- TRL's `grpo`, `bnpo` and `dr_grpo` average over accumulation steps, ours over the batch: one step here.
- TRL's entropy bonus is a mean over tokens whatever the loss; ours is aggregated like the rest: `token` here.
- TRL's cispo is bounded by `epsilon_high`, ours by 1 + clip_high, and from below by 1 - clip_low: 1 here.
- A ratio against `old_per_token_logps` is `proximal=recomputed`; without them, `current`.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from databus.codec import Array
from databus.groups import Group, run_lengths
from learner.advantages import decoupled_advantages, group_advantages, mixed_advantages
from learner.config import LossConfig
from learner.loss_sums import LossSums
from learner.losses import policy_loss
from learner.packing import plan_microbatches
from learner.sequences import sequences_of, weighted, with_advantages

NUM_GROUPS, GROUP_SIZE, MAX_TOKENS, VOCABULARY = 3, 4, 9, 11
NUM_COMPLETIONS = NUM_GROUPS * GROUP_SIZE
PAD, EOS = 0, 1
STEP = 12
TRL_EPS = 1e-4
TOLERANCE = 1e-5

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "group": partial(group_advantages, eps=TRL_EPS),
    "none": partial(group_advantages, scale=False),
    "batch": partial(mixed_advantages, eps=TRL_EPS),
}


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


@dataclass(frozen=True)
class Case:
    """Random completions, a third of them truncated, with forced tokens, versions and rewards of two parts.

    logits: float64 [B, C, V] of the policy now. old, sampled, reference: [B, C] log-probabilities.
    """

    groups: list[Group]
    logits: Tensor
    old: Tensor
    sampled: Tensor
    reference: Tensor


def make_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(NUM_COMPLETIONS, MAX_TOKENS, VOCABULARY)))
    groups = [make_group(rng) for _ in range(NUM_GROUPS)]
    now, _ = logprobs_and_entropies(logits, groups)
    old = now + torch.from_numpy(rng.normal(scale=0.25, size=now.shape))
    sampled = torch.clamp(old + torch.from_numpy(rng.normal(scale=0.2, size=now.shape)), max=0).float()
    reference = now + torch.from_numpy(rng.normal(scale=0.5, size=now.shape))
    for index, group in enumerate(groups):
        rows = sampled[index * GROUP_SIZE : (index + 1) * GROUP_SIZE]
        group.logprobs[:] = np.concatenate([row[:n] for row, n in zip(rows.numpy(), group.lengths, strict=True)])
    return Case(groups, logits, old, sampled, reference)


def make_group(rng: np.random.Generator) -> Group:
    lengths = rng.integers(1, MAX_TOKENS + 1, GROUP_SIZE).astype(np.int32)
    truncated = (rng.random(GROUP_SIZE) < 0.3).astype(np.uint8)
    truncated[lengths < MAX_TOKENS // 3] = 0
    num_tokens = int(lengths.sum())
    token_ids = rng.integers(2, VOCABULARY, num_tokens).astype(np.int32)
    token_ids[(np.cumsum(lengths) - 1)[truncated == 0]] = EOS
    values, spans = run_lengths(np.sort(rng.integers(STEP - 10, STEP + 1, num_tokens)).astype(np.int32))
    parts = rng.choice([0.0, 0.5, 1.0], (GROUP_SIZE, 2)).astype(np.float32)
    return Group(
        prompt_ids=np.array([3, 4], np.int32),
        lengths=lengths,
        token_ids=token_ids,
        logprobs=np.zeros(num_tokens, np.float32),
        loss_mask=(rng.random(num_tokens) < 0.9).astype(np.uint8),
        version_values=values,
        version_lengths=spans,
        rewards=parts.sum(axis=1),
        reward_parts=parts,
        truncated=truncated,
    )


def split(groups: list[Group], column: str) -> list[Array]:
    """A column of tokens by completion."""
    return [part for g in groups for part in np.split(getattr(g, column), np.cumsum(g.lengths)[:-1])]


def padded_ids(groups: list[Group]) -> Tensor:
    rows = [np.pad(ids, (0, MAX_TOKENS - len(ids)), constant_values=PAD) for ids in split(groups, "token_ids")]
    return torch.from_numpy(np.stack(rows)).long()


def logprobs_and_entropies(logits: Tensor, groups: list[Group]) -> tuple[Tensor, Tensor]:
    log_softmax = logits.log_softmax(-1)
    chosen = log_softmax.gather(2, padded_ids(groups)[..., None])[..., 0]
    return chosen, -(log_softmax.exp() * log_softmax).sum(-1)


# ---------------------------------------------------------------- TRL's side


class Frozen:
    """What TRL takes for a model: only its identity matters to the stub below."""

    training = True
    is_gradient_checkpointing = False


TRL_DEFAULTS: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "use_vllm": True,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 1.2,
    "vllm_importance_sampling_clip_min": None,
    "mask_truncated_completions": False,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "_entropy_bonus_enabled": False,
    "entropy_coef": 0.0,
    "delta": None,
}


def make_trainer(trainer_class: Any, case: Case, settings: dict[str, Any]) -> Any:
    chosen = TRL_DEFAULTS | settings
    assert chosen.keys() == TRL_DEFAULTS.keys()
    trainer = object.__new__(trainer_class)
    longest = int(max(group.lengths.max() for group in case.groups))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    args = SimpleNamespace(
        delta=chosen.pop("delta"),
        use_bias_correction_kl=False,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=NUM_COMPLETIONS,
        gradient_checkpointing_kwargs=None,
        report_to=[],
    )
    fixed = {
        "accelerator": accelerator,
        "args": args,
        "model": Frozen(),
        "ref_model": Frozen(),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_adaptive_entropy": False,
        "max_completion_length": MAX_TOKENS,
        "current_gradient_accumulation_steps": 1,
        "num_iterations": 1,
        "num_generations": GROUP_SIZE,
        "pad_to_multiple_of": None,
        "eos_token_ids": [EOS],
        "_tokenizer": SimpleNamespace(pad_token_id=PAD),
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "_is_vlm": False,
        "log_multimodal": False,
        "reward_weights": torch.ones(2),
        "reward_func_names": ["first", "second"],
        "reward_funcs": [None, None],
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
    for name, value in (fixed | chosen).items():
        setattr(trainer, name, value)
    known = {id(trainer.model): (case.old, None), id(trainer.ref_model): (case.reference, None)}

    def logprobs_of(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None, None]:
        logprobs, entropies = known[id(model)] if id(model) in known else logprobs_and_entropies(model, case.groups)
        return logprobs[:, :longest], None if entropies is None else entropies[:, :longest], None

    completions = [ids.tolist() for ids in split(case.groups, "token_ids")]
    masks = [mask.tolist() for mask in split(case.groups, "loss_mask")]
    logprobs = [values.tolist() for values in split(case.groups, "logprobs")]
    prompts = [[3, 4]] * NUM_COMPLETIONS
    trainer._get_per_token_logps_and_entropies = logprobs_of
    trainer._generate = lambda _: (prompts, completions, masks, [""] * NUM_COMPLETIONS, logprobs, {}, None, None)
    trainer._calculate_rewards = lambda *_: torch.from_numpy(np.concatenate([g.reward_parts for g in case.groups]))
    return trainer


def trl_batch(trainer: Any) -> dict[str, Any]:
    return trainer._generate_and_score_completions([{"prompt": "p"}] * NUM_COMPLETIONS)


def trl_loss(trainer: Any, case: Case) -> tuple[Tensor, Tensor]:
    logits = case.logits.clone().requires_grad_()
    loss = trainer._compute_loss(logits, trl_batch(trainer))
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


# ---------------------------------------------------------------- our side


def our_loss(
    case: Case, config: LossConfig, scale_rewards: str = "group", mask_truncated: bool = False
) -> tuple[Tensor, Tensor, LossSums]:
    logits = case.logits.clone().requires_grad_()
    logprobs, entropies = logprobs_and_entropies(logits, case.groups)
    rewards = torch.from_numpy(np.stack([group.rewards for group in case.groups]))
    advantages = list(ESTIMATORS[scale_rewards](rewards).numpy())
    sequences = sequences_of(case.groups, STEP, mask_truncated)
    places = [torch.from_numpy(sequence.targets - 2) for sequence in sequences]
    of_tokens = partial(loss_bearing, places=places)
    started = 0
    for index, sequence in enumerate(sequences):  # what `learner.scoring` would have said
        count = len(sequence.targets)
        part = slice(started, started + count)
        more = {"recomputed": of_tokens(case.old)[part].float().numpy()}
        more |= {"reference": of_tokens(case.reference)[part].float().numpy()} if config.kl_coef else {}
        sequences[index] = replace(sequence, **more)
        started += count
    ready = weighted(with_advantages(sequences, case.groups, advantages), config)
    microbatches = [m for rank in range(2) for m in plan_microbatches(ready, rank, 2, max_tokens=30)]
    loss, sums = torch.zeros((), dtype=torch.float64), LossSums.zeros(torch.device("cpu"))
    for microbatch in microbatches:
        own = of_tokens(logprobs)[microbatch.places], of_tokens(entropies)[microbatch.places]
        share, part_sums = policy_loss(*own, microbatch.tokens, config)
        loss, sums = loss + share, sums + part_sums
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad, sums


def loss_bearing(values: Tensor, places: list[Tensor]) -> Tensor:
    """[B, C] at the loss-bearing tokens of the completions, end to end."""
    return torch.cat([row[own] for row, own in zip(values, places, strict=True)])


def assert_same(trl: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor, LossSums]) -> None:
    assert trl[1].abs().max() > 1e-3
    assert torch.isclose(ours[0], trl[0].double(), atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.allclose(ours[1], trl[1].double(), atol=TOLERANCE, rtol=TOLERANCE)


# ---------------------------------------------------------------- the comparison

AGGREGATIONS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence"},
    "bnpo": {"aggregation": "token"},
    "dapo": {"aggregation": "token"},
    "dr_grpo": {"aggregation": "fixed", "fixed_tokens": MAX_TOKENS},
}
CORRECTIONS = {
    "token_truncate": "token_tis",
    "sequence_truncate": "sequence_tis",
    "token_mask": "token_mask",
    "sequence_mask": "sequence_mask",
}
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_clipped_loss(trainer_class: Any, loss_type: str, mode: str, mask_truncated: bool, seed: int) -> None:
    case = make_case(seed)
    settings = {"loss_type": loss_type, "vllm_importance_sampling_mode": mode}
    trainer = make_trainer(trainer_class, case, settings | {"mask_truncated_completions": mask_truncated})
    config = LossConfig(
        proximal="recomputed",
        correction=CORRECTIONS[mode],
        importance_cap=1.2,
        **AGGREGATIONS[loss_type],  # type: ignore[arg-type]
    )
    ours = our_loss(case, config, mask_truncated=mask_truncated)
    assert_same(trl_loss(trainer, case), ours)
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert ours[2].metrics()["loss/clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert clipped > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_corrections_bounded_from_below(trainer_class: Any, mode: str, seed: int) -> None:
    case = make_case(seed)
    settings = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": 0.9}
    config = LossConfig(
        proximal="recomputed",
        correction=CORRECTIONS[mode],  # type: ignore[arg-type]
        importance_low=0.9,
        importance_cap=1.2,
        aggregation="sequence",
    )
    assert_same(trl_loss(make_trainer(trainer_class, case, settings), case), our_loss(case, config))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale_rewards", ESTIMATORS)
def test_without_old_logprobs_the_ratio_is_one(trainer_class: Any, scale_rewards: str, seed: int) -> None:
    case = make_case(seed)
    settings = {"vllm_importance_sampling_correction": False, "scale_rewards": scale_rewards}
    config = LossConfig(proximal="current", correction="none", aggregation="sequence")
    trainer = make_trainer(trainer_class, case, settings)
    assert_same(trl_loss(trainer, case), our_loss(case, config, scale_rewards))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_gspo(trainer_class: Any, mode: str, seed: int) -> None:
    case = make_case(seed)
    settings = {"importance_sampling_level": "sequence", "vllm_importance_sampling_mode": mode}
    bounds = {"epsilon_low": 0.03, "epsilon_high": 0.04}
    config = LossConfig(
        kind="gspo",
        proximal="recomputed",
        clip_low=0.03,
        clip_high=0.04,
        correction=CORRECTIONS[mode],  # type: ignore[arg-type]
        importance_cap=1.2,
        aggregation="sequence",
    )
    ours = our_loss(case, config)
    assert_same(trl_loss(make_trainer(trainer_class, case, settings | bounds), case), ours)
    assert ours[2].metrics()["loss/clip_fraction"] > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("kind", ["cispo", "aipo"])
def test_cispo(trainer_class: Any, kind: Any, mode: str, seed: int) -> None:
    """TRL's cispo is ours without a lower bound, and ours called aipo with the cap as its bound."""
    case = make_case(seed)
    settings = {"loss_type": "cispo", "epsilon_high": 1.2, "vllm_importance_sampling_mode": mode}
    config = LossConfig(
        kind=kind,
        proximal="recomputed",
        clip_low=1.0,
        clip_high=0.2,
        correction=CORRECTIONS[mode],  # type: ignore[arg-type]
        importance_cap=1.2,
    )
    assert_same(trl_loss(make_trainer(trainer_class, case, settings), case), our_loss(case, config))


@pytest.mark.parametrize("seed", SEEDS)
def test_dual_clip(trainer_class: Any, seed: int) -> None:
    case = make_case(seed)
    config = LossConfig(proximal="recomputed", dual_clip=1.4, importance_cap=1.2, aggregation="sequence")
    ours = our_loss(case, config)
    assert_same(trl_loss(make_trainer(trainer_class, case, {"delta": 1.4}), case), ours)
    without = our_loss(case, LossConfig(proximal="recomputed", importance_cap=1.2, aggregation="sequence"))
    assert not torch.allclose(without[1], ours[1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_divergence_from_the_reference(trainer_class: Any, loss_type: str, seed: int) -> None:
    case = make_case(seed)
    trainer = make_trainer(trainer_class, case, {"loss_type": loss_type, "beta": 0.3})
    config = LossConfig(proximal="recomputed", importance_cap=1.2, kl_coef=0.3, **AGGREGATIONS[loss_type])
    ours = our_loss(case, config)
    assert_same(trl_loss(trainer, case), ours)
    (divergence,) = trainer._metrics["train"]["kl"]
    assert ours[2].metrics()["loss/reference_kl"] == pytest.approx(divergence, rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_bonus(trainer_class: Any, seed: int) -> None:
    case = make_case(seed)
    settings = {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.2}
    config = LossConfig(proximal="recomputed", importance_cap=1.2, entropy_coef=0.2)
    ours = our_loss(case, config)
    trainer = make_trainer(trainer_class, case, settings)
    assert_same(trl_loss(trainer, case), ours)
    (entropy,) = trainer._metrics["train"]["entropy"]
    assert ours[2].metrics()["loss/entropy"] == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale_rewards", ESTIMATORS)
def test_advantages(trainer_class: Any, scale_rewards: str, seed: int) -> None:
    case = make_case(seed)
    batch = trl_batch(make_trainer(trainer_class, case, {"scale_rewards": scale_rewards}))
    ours = ESTIMATORS[scale_rewards](torch.from_numpy(np.stack([group.rewards for group in case.groups])))
    assert torch.allclose(ours.flatten(), batch["advantages"], atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_advantages_of_parts(trainer_class: Any, seed: int) -> None:
    case = make_case(seed)
    trainer = make_trainer(trainer_class, case, {"multi_objective_aggregation": "normalize_then_sum"})
    parts = torch.from_numpy(np.stack([group.reward_parts for group in case.groups]))
    ours = decoupled_advantages(parts, eps=TRL_EPS)
    assert torch.allclose(ours.flatten(), trl_batch(trainer)["advantages"], atol=TOLERANCE)


def test_cases_have_what_they_are_for() -> None:
    case = make_case(0)
    assert any(group.truncated.any() for group in case.groups)
    assert any(len(set(group.lengths.tolist())) > 1 for group in case.groups)
    assert any((group.loss_mask == 0).any() for group in case.groups)
    assert len({sequence.lag for sequence in sequences_of(case.groups, STEP)}) > 3
