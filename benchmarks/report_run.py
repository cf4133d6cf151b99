"""Writes the folder of a long run that never was, in the formats of a real one, for `bench_report.py`."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from databus.groups import Group, encode_group
from databus.journal import Journal
from databus.ledger import group_id_of
from databus.records import BatchCut, BrokerEnded, BrokerStarted, GroupCompleted, GroupLeased, GroupMoved, StepTaken
from databus.staleness import LAG_BUCKETS
from echelon.config import DataConfig, RunConfig
from echelon.metrics import RowWriter
from echelon.run_folder import RunFolder, RunRecord
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

RUN_ID = "synthetic"
GROUP_SIZE, MAX_STALENESS = 8, 4
STEP_S, WAIT_S = 2.0, 0.9
START = 1_700_000_000.0
TEMPLATES = 64
COMMIT_EVERY = 64


def write_run(path: Path, steps: int, workers: int, tokens: int, batch_groups: int = 16, seed: int = 0) -> RunFolder:
    """Args: tokens: mean of a completion."""
    folder, random = RunFolder(path), np.random.default_rng(seed)
    path.mkdir(parents=True)
    config = RunConfig(
        model="none",
        data=DataConfig(train="none"),
        batch_groups=batch_groups,
        group_size=GROUP_SIZE,
        max_staleness=MAX_STALENESS,
        rollout=RolloutConfig(workers=workers, max_tokens=8 * tokens),
        learner=LearnerConfig(steps=steps),
    )
    folder.config_file.write_bytes(msgspec.json.encode(config))
    folder.record_file.write_bytes(msgspec.json.encode(RunRecord(run_id=RUN_ID, recipe="synthetic")))
    folder.prompts.mkdir()
    folder.train_prompts.write_text("{}\n" * 20_000)
    _write_rows(folder, steps, batch_groups, random)
    _write_samples(folder, steps, tokens, random)
    _write_journal(folder.journal, config, workers, tokens, random)
    return folder


def _write_rows(folder: RunFolder, steps: int, batch_groups: int, random: np.random.Generator) -> None:
    writer = RowWriter(folder.metrics_file)
    for step in range(steps):
        writer.write(_row(step, steps, random) | {"ledger/trained_groups": (step + 1) * batch_groups})
    writer.close()


def _row(step: int, steps: int, random: np.random.Generator) -> dict[str, Any]:
    """As many figures as a real row with drafting and difficulty has."""
    noise, learnt = random.random(8).tolist(), step / steps
    shares = random.dirichlet((1, 3, 4, 2, 0.1, 0.01)).tolist()
    by_lag = {f"{name}_lag{lag}": noise[0] * 0.1 for lag in LAG_BUCKETS for name in LAG_FIGURES}
    ends = {f"difficulty/{name}_{end}": noise[1] + learnt for name in SELECTED for end in ("dispatched", "trained")}
    drafts = {f"draft/acceptance_{kind}": 0.3 + noise[2] * 0.4 for kind in DRAFT_KINDS}
    row = {
        "step": step,
        "time_s": (step + 1) * (STEP_S + WAIT_S),
        "reward/mean": learnt * 0.6 + noise[3] * 0.3,
        "reward/answer": learnt * 0.6 + noise[3] * 0.2,
        "reward/format": noise[3] * 0.1,
        "rollout/length_mean": 200 + 100 * noise[4],
        "rollout/length_max": 900 + 100 * noise[4],
        "rollout/truncated_fraction": noise[5] * 0.02,
        "rollout/tokens_per_s": 50_000 + 9_000 * noise[6],
        "staleness/max_versions": float(round(4 * noise[7])),
        "staleness/mean_versions": 2 * noise[7],
        **{f"staleness/lag{lag}_share": share for lag, share in zip(LAG_BUCKETS, shares, strict=True)},
        "draft/acceptance": 0.3 + 0.3 * noise[2],
        "draft/accepted_per_round": 1 + noise[2],
        **drafts,
        "learner/tokens_per_s": 40_000 + 5_000 * noise[0],
        "learner/step_s": STEP_S * (0.9 + 0.2 * noise[1]),
        "learner/wait_s": WAIT_S * (0.5 + noise[2]),
        "learner/grad_norm": noise[3],
        "loss/policy": noise[4] - 0.5,
        "loss/entropy": 1 - learnt * 0.5,
        "loss/clip_fraction": noise[5] * 0.02,
        "loss/importance_truncated_fraction": noise[5] * 0.01,
        "mismatch/kl": noise[6] * 1e-3,
        "mismatch/ess": 0.9 + noise[6] * 0.1,
        **by_lag,
        "mismatch/kl_lag0": noise[6] * 1e-7,
        "weights/sync_s": noise[7],
        "weights/pause_s": noise[7] * 0.1,
        "weights/sent_bytes": 1e9,
        "bus/queued_groups": float(round(20 * noise[0])),
        "difficulty/length_predicted": 230.0,
        "difficulty/length_actual": 200 + 60 * noise[1],
        "difficulty/length_error_ratio": 0.2 + 0.1 * noise[2],
        **ends,
        "difficulty/selection_z": 3 * noise[3],
        "difficulty/selection_alarm": 0.0,
        "ledger/stale_groups": step // 3,
        "ledger/filtered_groups": 0,
        "ledger/failed_groups": 0,
        "ledger/expired_groups": step // 50,
    }
    return row | ({"eval/accuracy": 0.2 + 0.6 * learnt} if step % 20 == 0 else {})


LAG_FIGURES = ("mismatch/kl", "mismatch/ess", "loss/clip_fraction")
SELECTED = ("length", "pass_rate")
DRAFT_KINDS = ("own", "sibling", "epoch", "common", "lag0", "lag1", "lag2", "lag4", "lag8", "lag16")


def _write_samples(folder: RunFolder, steps: int, tokens: int, random: np.random.Generator) -> None:
    ids = random.integers(0, 1000, tokens).tolist()
    logprobs = np.round(-random.exponential(0.5, tokens), 3).tolist()
    with folder.samples_file.open("w") as file:
        for step in range(steps):
            runs = [[max(0, step - 2), tokens // 2], [step, tokens - tokens // 2]]
            row = {"step": step, "prompt": "a problem", "token_ids": ids, "reward": 1.0, "truncated": False}
            row |= {"versions": [step], "version_runs": runs, "logprobs": logprobs, "score": 1.3}
            file.write(f"{json.dumps(row)}\n" * 4)


def _write_journal(path: Path, config: RunConfig, workers: int, tokens: int, random: np.random.Generator) -> None:
    """Every step trains the oldest groups, a third of all steps drop one more as stale; workers take turns."""
    journal, cursor = Journal(path), 0
    groups = [encode_group(_group(tokens, random)) for _ in range(TEMPLATES)]
    started = BrokerStarted(
        run_id=RUN_ID,
        steps=config.learner.steps,
        group_size=GROUP_SIZE,
        batch_groups=config.batch_groups,
        max_staleness=MAX_STALENESS,
        stale_policy="drop",
        max_tokens=config.rollout.max_tokens,
        time_s=START,
    )
    journal.append(started)
    for step in range(config.learner.steps):
        now = START + step * (STEP_S + WAIT_S)
        ids = [
            group_id_of(RUN_ID, number, 0) for number in range(cursor, cursor + config.batch_groups + (step % 3 == 0))
        ]
        for number, group_id in enumerate(ids, cursor):
            worker, time_s = f"worker-{number % workers}", now + WAIT_S * (number - cursor) / len(ids)
            journal.append(
                GroupLeased(
                    group_id=group_id,
                    cursor=number,
                    attempt=0,
                    worker=worker,
                    time_s=time_s - workers / config.batch_groups * STEP_S,
                    predicted_tokens=int(tokens * (0.5 + random.random())),
                )
            )
            columns, frames = groups[number % TEMPLATES]
            journal.append(GroupCompleted(group_id=group_id, worker=worker, columns=columns, time_s=time_s), frames)
        cursor += len(ids)
        for group_id in ids[config.batch_groups :]:
            journal.append(GroupMoved(group_id=group_id, state="stale", time_s=now + WAIT_S))
        journal.append(BatchCut(step=step, group_ids=tuple(ids[: config.batch_groups]), time_s=now + WAIT_S))
        metrics = {f"learner/figure_{index}": 0.5 for index in range(30)}
        journal.append(StepTaken(step=step, metrics=metrics, time_s=now + WAIT_S + STEP_S))
        if step % COMMIT_EVERY == 0:
            journal.roll() if journal.segment_bytes > MAX_SEGMENT_BYTES else journal.commit()
    journal.append(BrokerEnded(ok=True, time_s=START + config.learner.steps * (STEP_S + WAIT_S)))
    journal.close()


MAX_SEGMENT_BYTES = 1 << 26


def _group(tokens: int, random: np.random.Generator) -> Group:
    lengths = np.maximum(1, random.poisson(tokens, GROUP_SIZE)).astype(np.int32)
    total = int(lengths.sum())
    rewards = random.integers(0, 2, GROUP_SIZE).astype(np.float32)
    return Group(
        prompt_ids=np.arange(32, dtype=np.int32),
        lengths=lengths,
        token_ids=random.integers(0, 1000, total).astype(np.int32),
        logprobs=-random.random(total).astype(np.float32),
        loss_mask=np.ones(total, np.uint8),
        version_values=np.array([0], np.int32),
        version_lengths=np.array([total], np.int32),
        rewards=rewards,
        reward_parts=np.zeros((GROUP_SIZE, 0), np.float32),
        truncated=np.zeros(GROUP_SIZE, np.uint8),
    )


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
