"""A step's row of metrics: what the learner reports, what workers report, and what the ledger knows."""

import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from databus.batches import CutBatch
from databus.codec import Array
from databus.draft_metrics import DraftMetrics
from databus.episode_metrics import EpisodeMetrics
from databus.groups import Group
from databus.messages import Mismatch, VersionApplied
from databus.peers import Peer
from databus.scoring_metrics import ScoringMetrics
from databus.staleness import LAG_BUCKETS


class StepMetrics:
    """Collects between steps; `row` closes a step. Times in seconds since `start`, when all roles were up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: float | None = None
        self._since = clock()
        self._tokens = 0
        self._updates: list[VersionApplied] = []
        self._mismatches: list[Mismatch] = []
        self._refused: set[int] = set()
        self._drafting = DraftMetrics()
        self._scoring = ScoringMetrics()
        self._episodes = EpisodeMetrics()
        self._slow: dict[str, float] = {}
        self._num_slow = 0

    def start(self) -> None:
        """All roles are up; only the first call counts."""
        if self._start is None:
            self._start = self._since = self._clock()

    def elapsed_s(self) -> float:
        return 0.0 if self._start is None else self._clock() - self._start

    def completed(self, group: Group) -> None:
        self._tokens += group.num_tokens

    def applied(self, update: VersionApplied) -> None:
        self._updates.append(update)
        if update.mismatch is not None:
            self._mismatches.append(update.mismatch)

    def refused(self, version: int, mismatch: Mismatch) -> None:
        """An engine's mismatch gate did not let the version pass."""
        self._refused.add(version)
        self._mismatches.append(mismatch)

    def slow(self, worker: str, tokens_per_s: float) -> None:
        """A worker is sent away for that; it is named in the next row."""
        self._slow[f"slow/{worker}_tokens_per_s"] = tokens_per_s
        self._num_slow += 1

    def heard(self, peer: Peer) -> None:
        self._drafting.heard(peer)
        self._scoring.heard(peer)
        self._episodes.heard(peer)

    def row(self, batch: CutBatch, learner: Mapping[str, float], queued: int, counts: Mapping[str, int]) -> dict:
        """The row of a step that was just taken."""
        now = self._clock()
        row: dict[str, float] = {"step": batch.step, "time_s": self.elapsed_s()}
        row |= _reward_metrics(batch) | _length_metrics(batch) | _staleness_metrics(batch)
        row["rollout/tokens_per_s"] = self._tokens / max(1e-9, now - self._since)
        row |= self._drafting.since_last() | self._scoring.since_last() | self._episodes.since_last()
        row |= self._weight_metrics() | self._gate_metrics()
        row["bus/queued_groups"] = queued
        row |= {"bus/slow_workers": self._num_slow} | self._slow
        row |= {f"ledger/{state}_groups": count for state, count in counts.items()}
        self._since, self._tokens, self._updates, self._mismatches, self._slow = now, 0, [], [], {}
        return row | dict(learner)

    def _weight_metrics(self) -> dict[str, float]:
        """Of the updates since the last step; 0 where there was none. Times are those of the slowest worker."""
        return {
            "weights/sync_s": max((update.sync_s for update in self._updates), default=0.0),
            "weights/pause_s": max((update.pause_s for update in self._updates), default=0.0),
            "weights/delay_s": max((update.delay_s for update in self._updates), default=0.0),
            "weights/sent_bytes": sum(update.received_bytes for update in self._updates),
        }

    def _gate_metrics(self) -> dict[str, float]:
        """The worst of the versions that came to a gate since the last step, 0 where none did; refused ones in all."""
        return {
            "gate/kl": max((each.kl for each in self._mismatches), default=0.0),
            "gate/difference": max((each.difference for each in self._mismatches), default=0.0),
            "gate/refused_versions": len(self._refused),
        }


def _reward_metrics(batch: CutBatch) -> dict[str, float]:
    """A part that calls itself `mean` does not hide the reward's own."""
    mean = float(np.mean(np.concatenate([item.group.rewards for item in batch.groups])))
    by_names: dict[tuple[str, ...], list[Array]] = {}
    for item in batch.groups:
        by_names.setdefault(item.reward_names, []).append(item.group.reward_parts)
    parts: dict[str, list[Array]] = {}
    for names, rows in by_names.items():
        for name, values in zip(names, np.concatenate(rows).T, strict=True):
            parts.setdefault(name, []).append(values)
    means = {f"reward/{name}": float(np.mean(np.concatenate(values))) for name, values in parts.items()}
    return means | {"reward/mean": mean}


def _length_metrics(batch: CutBatch) -> dict[str, float]:
    lengths = np.concatenate([item.group.lengths for item in batch.groups])
    truncated = np.concatenate([item.group.truncated for item in batch.groups])
    tokens = sum(item.group.num_tokens for item in batch.groups)
    loss_tokens = sum(sum(item.group.loss_tokens[1]) for item in batch.groups)
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_fraction": float(truncated.mean()),
        "rollout/masked_fraction": 1 - loss_tokens / tokens if tokens else 0.0,
    }


def _staleness_metrics(batch: CutBatch) -> dict[str, float]:
    """Lags of loss-bearing tokens, in versions, and their shares by lag."""
    spans = [item.group.loss_tokens for item in batch.groups]
    lags = batch.step - np.concatenate([versions for versions, _ in spans])
    tokens = np.concatenate([tokens for _, tokens in spans])
    buckets = np.searchsorted(list(LAG_BUCKETS.values()), lags, side="right") - 1
    shares = np.bincount(buckets, tokens, len(LAG_BUCKETS)) / tokens.sum()
    return {
        "staleness/max_versions": float(lags.max()),
        "staleness/mean_versions": float(lags @ tokens / tokens.sum()),
    } | {f"staleness/lag{name}_share": share for name, share in zip(LAG_BUCKETS, shares.tolist(), strict=True) if share}


class RowQueue:
    """Rows leave in the order of steps, and not before the evaluation of their version is done."""

    def __init__(self, write: Callable[[Mapping[str, float]], None]) -> None:
        self._write = write
        self._rows: deque[dict[str, float]] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, float]) -> None:
        self._rows.append(row)

    def flush(self, is_pending: Callable[[int], bool], take_result: Callable[[int], dict[str, float]]) -> None:
        while self._rows and not is_pending(int(self._rows[0]["step"])):
            row = self._rows.popleft()
            self._write(row | take_result(int(row["step"])))
