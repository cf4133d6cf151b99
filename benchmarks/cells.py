"""Series of long runs of the demo's recipe that can be interrupted: what one gave is in a file, and not run again."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import commit
from demo_run import prepare, train
from role_cpu import RoleCpu

SKIPPED_STEPS = 5
"""At the start, over which what is compiled on first use is no measurement."""
CELL_TIMEOUT_S = 5400.0

Cells = dict[str, dict]
"""Figures of runs, by the cell's name."""


@dataclass(frozen=True)
class Cell:
    """One run: its name in the result, the seed of task and run, the settings."""

    name: str
    seed: int
    overrides: tuple[str, ...]


def known_cells(path: Path) -> Cells:
    return json.loads(path.read_text())["figures"]["cells"] if path.exists() else {}


def run_cells(path: Path, cells: Sequence[Cell], write: Callable[[Cells], None]) -> int:
    """Run what `path` lacks, in this order; `write` gets all that is known after each. Returns: an exit code.

    A run that fails is named and left for the next call.
    """
    failed = []
    for cell in cells:
        if known_cells(path).get(cell.name, {}).get("overrides") == list(cell.overrides):
            continue
        print(f"---- {cell.name}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                task = prepare(cell.seed)
                cpu = RoleCpu(run_dir := Path(folder) / "run")
                cpu.start()
                rows, wall_s = train(task, cell.seed, run_dir, *cell.overrides, timeout_s=CELL_TIMEOUT_S)
                cpu.stop()
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{cell.name} ({error})")
            continue
        known = known_cells(path)
        known[cell.name] = {
            "overrides": list(cell.overrides),
            "commit": commit(),
            **summarise(rows, wall_s),
            "core_s": core_s(cpu, len(rows)),
        }
        write(known)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


def core_s(cpu: RoleCpu, rows: int) -> dict[str, float]:
    """Seconds of processor time a step, by role."""
    steps, used = cpu.between(SKIPPED_STEPS, rows - 1)
    return {role: seconds / steps for role, seconds in used.items()}


def summarise(rows: list[dict], wall_s: float) -> dict:
    """Speed and accuracy of a run. Seconds and tokens are over the steps after the first `SKIPPED_STEPS`."""
    steps = [row for row in rows if "loss/policy" in row]
    taken = steps[SKIPPED_STEPS:]
    elapsed = taken[-1]["time_s"] - steps[SKIPPED_STEPS - 1]["time_s"]
    tokens = [row["learner/tokens_per_s"] * row["learner/step_s"] for row in steps]
    training = sum(row["learner/step_s"] for row in taken)
    waiting = sum(row["learner/wait_s"] for row in taken)
    return {
        "steps": len(steps),
        "wall_s": wall_s,
        "trained_tokens_per_s": sum(tokens[SKIPPED_STEPS:]) / elapsed,
        "rollout_tokens_per_s": statistics.median(row["rollout/tokens_per_s"] for row in taken),
        "train_s": training / len(taken),
        "wait_s": waiting / len(taken),
        "step_s": elapsed / len(taken),
        "learner_idle": waiting / elapsed,
        "staleness_mean": statistics.fmean(row["staleness/mean_versions"] for row in taken),
        "staleness_max": max(row["staleness/max_versions"] for row in taken),
        "stale_groups": steps[-1]["ledger/stale_groups"],
        "accepted_per_round": statistics.fmean(row.get("draft/accepted_per_round", 0.0) for row in taken),
        "curve": curve(rows, tokens),
    }


def curve(rows: list[dict], tokens: list[float]) -> list[dict]:
    """Accuracy of a version, and when it was made: tokens trained by then, seconds since all roles were up."""
    ends = {row["step"]: row["time_s"] for row in rows if "loss/policy" in row}
    return [
        {
            "version": row["step"],
            "tokens": round(sum(tokens[: row["step"]])),
            "time_s": ends.get(row["step"] - 1, 0.0),
            "accuracy": row["eval/accuracy"],
        }
        for row in rows
        if "eval/accuracy" in row
    ]
