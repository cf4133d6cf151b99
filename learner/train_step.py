"""One optimizer step on one batch, and its metrics."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from databus.groups import Group
from learner.config import LearnerConfig
from learner.losses import LossSums, policy_loss
from learner.model import PolicyModel, reshard
from learner.optimizer import clip_gradients
from learner.packing import MicroBatch, plan_microbatches, sequences_of

logger = logging.getLogger(__name__)


class TrainStep:
    """Takes optimizer steps; every rank calls it with the same groups."""

    def __init__(
        self, policy: PolicyModel, optimizer: Optimizer, scheduler: LRScheduler, config: LearnerConfig
    ) -> None:
        self._policy = policy
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._config = config
        self._device = next(policy.parameters()).device
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()

    def __call__(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Train on a batch; its metrics, the same on every rank.

        The gradient is that of the mean loss over all loss-bearing tokens of the batch: it does not depend on
        micro-batches or ranks.
        Raises: RuntimeError, before anything has changed, if the loss or the gradient norm is not finite.
        """
        sequences = sequences_of(groups, self._config.scale_rewards)
        num_loss_tokens = max(1, sum(len(sequence.targets) for sequence in sequences))
        microbatches = plan_microbatches(sequences, self._rank, self._world_size, self._config.microbatch_tokens)
        totals = torch.zeros(11, dtype=torch.float64, device=self._device)
        for microbatch in microbatches:
            totals += self._accumulate(microbatch.to(self._device), step, num_loss_tokens)
        dist.all_reduce(totals)
        metrics = loss_metrics(totals.cpu())
        metrics["learner/lr"] = float(self._scheduler.get_last_lr()[0])
        metrics["learner/num_tokens"] = float(sum(sequence.num_inputs for sequence in sequences))
        metrics["learner/grad_norm"] = self._apply(metrics["loss/policy"], step)
        metrics["advantage/zero_groups_fraction"] = _zero_groups_fraction(groups)
        return metrics

    def _accumulate(self, microbatch: MicroBatch, step: int, num_loss_tokens: int) -> Tensor:
        """Add a micro-batch's gradient; returns float64 [11]: the `LossSums`, then the summed entropy."""
        with torch.set_grad_enabled(microbatch.needs_gradient):
            logprobs, entropy = self._policy(
                microbatch.input_ids, microbatch.position_ids, microbatch.loss_positions, microbatch.targets
            )
            loss, sums = policy_loss(
                logprobs,
                microbatch.sampled,
                microbatch.advantages,
                torch.ones_like(microbatch.targets, dtype=torch.bool),
                step - microbatch.oldest_versions,
                self._config.loss,
            )
        if microbatch.needs_gradient:
            (loss / num_loss_tokens).backward()
        else:
            reshard(self._policy)
        return torch.cat((sums.vector(), entropy.double().sum()[None]))

    def _apply(self, loss: float, step: int) -> float:
        grad_norm = clip_gradients(self._policy.parameters(), self._config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise RuntimeError(f"step {step} not taken: loss {loss}, gradient norm {grad_norm}; a lower lr may help")
        self.optimizer.step()
        self._scheduler.step()
        self.optimizer.zero_grad()
        return grad_norm


def loss_metrics(totals: Tensor) -> dict[str, float]:
    """Means over all loss-bearing tokens. Args: totals: float64 [11], `LossSums` and the summed entropy, global.

    mismatch/ess is normalised, (Σw)² / (n Σw²), in 0..1. mismatch/kl_lag0 is there only where a token has lag 0.
    """
    sums = LossSums.from_vector(totals[:-1])
    tokens = max(1.0, sums.tokens.item())
    weight, weight_squared = sums.weight.item(), sums.weight_squared.item()
    metrics = {
        "loss/policy": sums.loss.item() / tokens,
        "loss/entropy": totals[-1].item() / tokens,
        "loss/clip_fraction": (sums.clipped_low + sums.clipped_high).item() / tokens,
        "loss/importance_truncated_fraction": sums.truncated.item() / tokens,
        "mismatch/kl": sums.k3.item() / tokens,
        "mismatch/ess": weight * weight / (tokens * weight_squared) if weight_squared > 0 else 1.0,
    }
    if sums.lag0_tokens.item() > 0:
        metrics["mismatch/kl_lag0"] = sums.lag0_k3.item() / sums.lag0_tokens.item()
    return metrics


def _zero_groups_fraction(groups: Sequence[Group]) -> float:
    """Share of groups whose rewards are all equal: they teach nothing."""
    return sum(bool((group.rewards == group.rewards[0]).all()) for group in groups) / max(1, len(groups))
