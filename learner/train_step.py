"""The optimizer updates of one batch, and their metrics."""

import logging
import math
from collections.abc import Sequence as Items
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from databus.groups import Group
from learner.advantage_function import AdvantageFunction
from learner.advantages import estimate_advantages
from learner.config import LearnerConfig
from learner.loss_sums import LossSums
from learner.losses import policy_loss
from learner.model import PolicyModel, num_trainable, reshard
from learner.optimizer import clip_gradients
from learner.overlong import without_overlong
from learner.packing import MicroBatch, plan_microbatches
from learner.reference import penalised, score_reference
from learner.scoring import score
from learner.sequences import Sequence, sequences_of, weighted, with_advantages

logger = logging.getLogger(__name__)


class TrainStep:
    """Takes the step of one batch after the other; every rank calls it with the same groups."""

    def __init__(
        self,
        policy: PolicyModel,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        config: LearnerConfig,
        reference: PolicyModel | None = None,
        advantage_function: AdvantageFunction | None = None,
    ) -> None:
        """Args: reference: where `loss.kl_coef` is above 0, the frozen initial model; with adapters, the policy.
        advantage_function: the one that `advantage.estimator` names, if it names one."""
        self._policy = policy
        self.optimizer = optimizer
        self._scheduler = scheduler
        self._config = config
        self._reference = reference
        self._advantage_function = advantage_function
        self._device = policy.device
        self._rank = dist.get_rank()
        self._world_size = dist.get_world_size()

    @property
    def frozen_models(self) -> list[PolicyModel]:
        """Those that it scores with beside the policy."""
        if self._reference is None or self._reference is self._policy:
            return []
        return [self._reference]

    def __call__(self, groups: Items[Group], step: int) -> dict[str, float]:
        """Train on a batch; its metrics, the same on every rank.

        The gradient is that of the minibatch's aggregated loss: it does not depend on micro-batches or ranks.
        Raises: ValueError for groups or advantages that cannot be trained on; RuntimeError, before an update has
            changed anything, if its loss or gradient norm is not finite.
        """
        sequences = self._prepared(groups, step)
        if not any(len(sequence.targets) for sequence in sequences):
            logger.warning("step %d: no token of its %d groups bears loss: a gradient of zero", step, len(groups))
        lr = float(self._scheduler.get_last_lr()[0])
        sums = LossSums.zeros(torch.device("cpu"))
        norms: list[float] = []
        for index in range(self._config.minibatches):
            minibatch = weighted(sequences[index :: self._config.minibatches], self._config.loss)
            part = self._accumulate(minibatch)
            norms.append(self._update(float(part.metrics()["loss/policy"]), step))
            sums += part
        self._scheduler.step()
        metrics = sums.metrics(self._config.minibatches)
        metrics["learner/lr"] = lr
        metrics["learner/num_tokens"] = float(sum(s.num_inputs for s in sequences if len(s.targets)))
        metrics["learner/grad_norm"] = sum(norms) / len(norms)
        metrics["learner/num_trainable"] = float(num_trainable(self._policy))
        metrics["advantage/zero_groups_fraction"] = _zero_groups_fraction(groups)
        return metrics

    def _prepared(self, groups: Items[Group], step: int) -> list[Sequence]:
        """A sequence for every completion, with its advantages, and what frozen models say of it."""
        config, max_tokens = self._config, self._config.microbatch_tokens
        advantage = config.advantage
        sequences = sequences_of(groups, step, advantage.mask_truncated)
        groups = without_overlong(groups, advantage.overlong_tokens, advantage.overlong_cache_tokens)
        if self._reference is not None:
            reference = score_reference(self._reference, sequences, max_tokens)
            sequences = [replace(s, reference=values) for s, values in zip(sequences, reference, strict=True)]
            if config.loss.kl_in == "reward":
                groups = penalised(groups, sequences, config.loss)
        if config.loss.proximal == "recomputed" and config.minibatches > 1:
            recomputed = score(self._policy, sequences, max_tokens)
            sequences = [replace(s, recomputed=values) for s, values in zip(sequences, recomputed, strict=True)]
        advantages = estimate_advantages(groups, advantage.estimator, self._advantage_function)
        return with_advantages(sequences, groups, advantages)

    def _accumulate(self, minibatch: Items[Sequence]) -> LossSums:
        """Add up the gradient of a minibatch; its sums over all ranks."""
        sums = LossSums.zeros(self._device)
        max_tokens, attention_tokens = self._config.microbatch_tokens, self._policy.attention_tokens
        plan = plan_microbatches(minibatch, self._rank, self._world_size, max_tokens, attention_tokens)
        for microbatch in plan:
            sums += self._accumulate_part(microbatch.to(self._device))
        dist.all_reduce(sums.values)
        return LossSums(sums.values.cpu())

    def _accumulate_part(self, microbatch: MicroBatch) -> LossSums:
        with torch.set_grad_enabled(microbatch.needs_gradient):
            logprobs, entropy = self._policy(
                microbatch.input_ids, microbatch.position_ids, microbatch.loss_positions, microbatch.targets
            )
            loss, sums = policy_loss(logprobs, entropy, microbatch.tokens, self._config.loss)
        if microbatch.needs_gradient:
            loss.backward()
        else:
            reshard(self._policy)
        return sums

    def _update(self, loss: float, step: int) -> float:
        """One optimizer update; the gradient norm before it was clipped."""
        grad_norm = clip_gradients(self._policy.parameters(), self._config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise RuntimeError(f"step {step} not taken: loss {loss}, gradient norm {grad_norm}; a lower lr may help")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm


def _zero_groups_fraction(groups: Items[Group]) -> float:
    """Share of groups whose rewards are all equal: they teach nothing."""
    return sum(bool((group.rewards == group.rewards[0]).all()) for group in groups) / max(1, len(groups))
