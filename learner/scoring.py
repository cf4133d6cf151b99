"""Log-probabilities of a whole batch under given weights: the initial ones, or those that the batch begins with."""

from collections.abc import Sequence as Items

import torch
import torch.distributed as dist

from databus.codec import Array
from learner.model import PolicyModel, reshard
from learner.packing import plan_microbatches
from learner.sequences import Sequence


@torch.no_grad()
def score(model: PolicyModel, sequences: Items[Sequence], max_tokens: int) -> list[Array]:
    """Log-probability of each sequence's K loss-bearing tokens, float32 [K]; the same on every rank.

    Args: sequences: of a whole batch, in order. max_tokens: as `plan_microbatches`.
    """
    logprobs = torch.zeros(sum(len(sequence.targets) for sequence in sequences), device=model.device)
    scored = [sequence for sequence in sequences if len(sequence.targets)]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for planned in plan_microbatches(scored, rank, world_size, max_tokens, model.attention_tokens):
        part = planned.to(model.device)
        logprobs[part.places], _ = model(part.input_ids, part.position_ids, part.loss_positions, part.targets)
        reshard(model)
    dist.all_reduce(logprobs)
    values = logprobs.cpu().numpy()
    return [values[sequence.start : sequence.start + len(sequence.targets)] for sequence in sequences]
