"""The reference policy: the initial model, frozen; and rewards less the divergence from it."""

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import torch

from databus.codec import Array
from databus.groups import Group
from learner.config import LossConfig
from learner.divergence import divergence
from learner.lora import adapters_off
from learner.model import ModelOptions, PolicyModel, build_model
from learner.scoring import score
from learner.sequences import Sequence


def build_reference(model_path: str, options: ModelOptions) -> PolicyModel:
    """The model that the run started from, also in a run that resumes, sharded like the policy."""
    return build_model(model_path, options).requires_grad_(False)


def score_reference(reference: PolicyModel, sequences: Items[Sequence], max_tokens: int) -> list[Array]:
    """As `score`, by the initial model: where the reference has adapters, it is the policy, without them."""
    with adapters_off(reference.lora):
        return score(reference, sequences, max_tokens)


def penalised(groups: Items[Group], sequences: Items[Sequence], config: LossConfig) -> list[Group]:
    """Groups whose rewards are r - kl_coef · Σ divergence over the completion's loss-bearing tokens.

    The divergence is that of the policy that sampled them, as in PPO for language models: it is known before the step,
    and a reward belongs to what was sampled.
    Args: sequences: one a completion, in order, with `reference`.
    Source: Ziegler et al. (arXiv:1909.08593), with k1. TRL 1.16's GRPOTrainer has the divergence in the loss alone.
    """
    penalties = np.array([_penalty(sequence, config) for sequence in sequences], np.float32)
    ends = np.cumsum([group.size for group in groups])[:-1]
    each = zip(groups, np.split(penalties, ends), strict=True)
    return [replace(group, rewards=group.rewards - penalty) for group, penalty in each]


def _penalty(sequence: Sequence, config: LossConfig) -> float:
    assert sequence.reference is not None
    log_ratio = torch.from_numpy(sequence.reference - sequence.logprobs).double()
    return config.kl_coef * divergence(log_ratio, config.kl_estimator).sum().item()
