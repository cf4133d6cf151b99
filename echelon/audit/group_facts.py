"""What an audit keeps of a completed group's columns, and what it reckons of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from databus.codec import Array, Frame
from databus.groups import Group, decode_group
from databus.records import GroupCompleted


@dataclass(frozen=True)
class GroupFacts:
    """digest: of all columns. prompt_tokens: length of the prompt. lengths, rewards, truncated: [G], a completion each.
    newest: [G], the newest version among a completion's loss-bearing tokens; -1 where it has none.
    versions, counts: [S], how many loss-bearing tokens each version sampled, ascending.
    """

    digest: int
    prompt_tokens: int
    lengths: Array
    rewards: Array
    truncated: Array
    newest: Array
    versions: Array
    counts: Array

    @property
    def oldest_version(self) -> int:
        """-1 where no token bears loss."""
        return int(self.versions[0]) if len(self.versions) else -1

    def is_fresh(self, step: int, max_staleness: int, masks: bool) -> bool:
        """May `step` train it? Where old tokens are masked, one that is young enough will do."""
        if not len(self.versions):
            return False
        return step - int(self.versions[-1 if masks else 0]) <= max_staleness


def read_facts(record: GroupCompleted, frames: Sequence[Frame]) -> GroupFacts:
    """Raises: MalformedMessage for columns that no group can have."""
    group = decode_group(record.columns, frames)
    versions, counts = np.unique(group.token_versions()[group.loss_mask.astype(bool)], return_counts=True)
    return GroupFacts(
        digest=_digest(record, frames),
        prompt_tokens=len(group.prompt_ids),
        lengths=group.lengths.copy(),
        rewards=group.rewards.copy(),
        truncated=group.truncated.copy(),
        newest=_newest_loss_versions(group),
        versions=versions,
        counts=counts,
    )


def _digest(record: GroupCompleted, frames: Sequence[Frame]) -> int:
    digest = xxhash.xxh3_128(msgspec.msgpack.encode((record.columns, record.reward_names)))
    for frame in frames:
        digest.update(frame)
    return digest.intdigest()


def _newest_loss_versions(group: Group) -> Array:
    """int64 [G]; -1 where a completion has no loss-bearing token."""
    masked = np.where(group.loss_mask.astype(bool), group.token_versions(), -1)
    ends = np.cumsum(group.lengths)
    return np.array(
        [masked[end - length : end].max(initial=-1) for length, end in zip(group.lengths, ends, strict=True)], np.int64
    )


@dataclass(frozen=True)
class BatchFacts:
    """Of a batch as it was trained. loss_tokens: those that bore loss. inputs: tokens that the learner read."""

    tokens: int
    loss_tokens: int
    inputs: int
    max_lag: int
    row: dict[str, float]
    """What metrics.jsonl must say of it."""


def batch_facts(groups: Sequence[GroupFacts], step: int, max_staleness: int, masks: bool) -> BatchFacts:
    """Args: masks: tokens older than the bound bore no loss. At least one token must have borne loss."""
    lags = step - np.concatenate([facts.versions for facts in groups])
    counts = np.concatenate([facts.counts for facts in groups])
    if masks:
        counts = counts[lags <= max_staleness]
        lags = lags[lags <= max_staleness]
    oldest_trained = step - max_staleness if masks else 0
    lengths = np.concatenate([facts.lengths for facts in groups])
    inputs = sum(
        int((facts.lengths + facts.prompt_tokens - 1)[facts.newest >= oldest_trained].sum()) for facts in groups
    )
    return BatchFacts(
        tokens=int(lengths.sum()),
        loss_tokens=int(counts.sum()),
        inputs=inputs,
        max_lag=int(lags.max()),
        row={
            "reward/mean": float(np.concatenate([facts.rewards for facts in groups]).mean(dtype=np.float64)),
            "rollout/length_mean": float(lengths.mean()),
            "rollout/length_max": float(lengths.max()),
            "rollout/truncated_fraction": float(np.concatenate([facts.truncated for facts in groups]).mean()),
            "staleness/max_versions": float(lags.max()),
            "staleness/mean_versions": float((lags * counts).sum() / counts.sum()),
        },
    )
