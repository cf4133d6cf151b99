"""metrics.jsonl and samples.jsonl: a row a step, written once and flushed, so that others may follow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from databus.codec import Array
from databus.groups import run_lengths
from databus.prompts import SampledGroup
from echelon.files import cut_torn_row

REQUIRED = (
    "step",
    "time_s",
    "reward/mean",
    "rollout/tokens_per_s",
    "rollout/length_mean",
    "rollout/length_max",
    "staleness/max_versions",
    "staleness/mean_versions",
    "draft/accepted_per_round",
    "draft/acceptance",
    "learner/tokens_per_s",
    "learner/step_s",
    "learner/wait_s",
    "learner/grad_norm",
    "loss/policy",
    "mismatch/kl",
    "mismatch/ess",
    "weights/sync_s",
    "weights/sent_bytes",
    "weights/pause_s",
    "bus/queued_groups",
    "ledger/trained_groups",
    "ledger/stale_groups",
    "ledger/filtered_groups",
    "ledger/failed_groups",
)
"""What the row of every step has. Rows of evaluated versions have `EVALUATION` as well."""

EVALUATION = "eval/accuracy"
TRAINED = "loss/policy"
"""Tells a step's row from the last one, which has only the final version's evaluation."""


def sample_rows(step: int, groups: Sequence[SampledGroup]) -> list[dict[str, Any]]:
    """Of each group the completion with the highest reward and the one with the lowest, for people to read.

    version_runs: [version, tokens] one after the other. score: the reward's distance from its group's mean, in standard
    deviations (0 where all rewards are equal), which is GRPO's advantage.
    """
    rows: list[dict[str, Any]] = []
    for prompt, group in groups:
        starts = np.concatenate(([0], np.cumsum(group.lengths)))
        versions = group.token_versions()
        mean, deviation = float(group.rewards.mean()), float(group.rewards.std())
        for index in dict.fromkeys((int(group.rewards.argmax()), int(group.rewards.argmin()))):
            tokens = slice(int(starts[index]), int(starts[index + 1]))
            rows.append(
                {
                    "step": step,
                    "prompt": prompt,
                    "token_ids": group.token_ids[tokens].tolist(),
                    "reward": float(group.rewards[index]),
                    "truncated": bool(group.truncated[index]),
                    "versions": sorted(set(versions[tokens].tolist())),
                    "version_runs": _runs(versions[tokens]),
                    "logprobs": [round(value, 3) for value in group.logprobs[tokens].tolist()],
                    "score": round((float(group.rewards[index]) - mean) / deviation, 3) if deviation > 0 else 0.0,
                }
            )
    return rows


def _runs(versions: Array) -> list[list[int]]:
    values, lengths = run_lengths(versions)
    return [list(pair) for pair in zip(values.tolist(), lengths.tolist(), strict=True)]


class RowWriter:
    """Appends rows to a file of JSON lines; a reader sees whole rows once they are written."""

    def __init__(self, file: Path) -> None:
        """Goes on after the last whole row: a crash of the machine may have torn the one after it."""
        cut_torn_row(file)
        self._file = file.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(msgspec.json.encode(row) + b"\n")

    def close(self) -> None:
        self._file.close()
