"""The optimizer, the learning-rate schedule, and gradient clipping."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from learner.apollo import ShardedApollo
from learner.beside_adamw import BesideAdamW
from learner.config import LearnerConfig
from learner.muon import ShardedMuon


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: LearnerConfig, matrices: Iterable[nn.Parameter] = ()
) -> tuple[Optimizer, LambdaLR]:
    """AdamW (arXiv:1711.05101), or Muon or APOLLO beside it, and a scheduler whose rate for step s is
    `lr · lr_factor(s)`.

    Args: parameters: all of them; frozen ones are left alone. matrices: those that `muon` and `apollo` are for.
    Raises: ValueError if one of these is chosen and there is no matrix, or no library.
    """
    parameters, matrices = ([each for each in given if each.requires_grad] for given in (parameters, matrices))
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adamw":
            optimizer: Optimizer = AdamW(parameters, **settings)
        case "muon":
            decay = config.weight_decay
            muon = ShardedMuon(matrices, lr=config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            optimizer = BesideAdamW(muon, parameters, **settings)
        case "apollo":
            apollo = ShardedApollo(matrices, config=config.apollo, **settings)
            optimizer = BesideAdamW(apollo, parameters, **settings)
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(step, config))


def lr_factor(step: int, config: LearnerConfig) -> float:
    """Share of the peak rate at optimizer step `step` (from 0): linear warm-up, then the schedule, to 0 at `steps`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a global L2 norm of `max_norm`; the norm before that, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def resume_schedule(scheduler: LambdaLR, step: int) -> None:
    """Set the rate for optimizer step `step`, as if the scheduler had seen the steps before it."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
