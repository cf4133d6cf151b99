"""Does every algorithm of the GRPO family learn, on policy and off?

    python benchmarks/bench_losses.py --json benchmarks/results/bench_losses.json
    python benchmarks/bench_losses.py --json OUT --cells grpo:2 gspo:0

A cell is an algorithm (`algorithms.py`) at a bound on staleness: `recipes/grpo_chain_sum.py` with real vLLM, the
demo's 100 steps. OUT is written after every cell, and a cell that it has is not run again, so an interrupted series
goes on where it stood; a run that fails is named and left for the next call. 18 cells of 6 to 12 minutes on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from algorithms import ALGORITHMS
from common import Bar, commit, hardware, write_result
from demo_run import prepare, train

STALENESS = (0, 2, 8)
STEPS = 100
GAIN = 0.10
CELL_TIMEOUT_S = 5400.0

Cells = dict[str, dict[str, dict]]
"""Figures of runs by algorithm and max_staleness, so that a reader sees the bounds side by side."""


def cell_name(text: str) -> tuple[str, int]:
    """`grpo:2` -> ("grpo", 2)."""
    algorithm, _, staleness = text.partition(":")
    if algorithm not in ALGORITHMS or not staleness.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected ALGORITHM:MAX_STALENESS, of {', '.join(ALGORITHMS)}")
    return algorithm, int(staleness)


def run_cell(algorithm: str, staleness: int, steps: int, seed: int) -> dict:
    overrides = [*ALGORITHMS[algorithm], f"max_staleness={staleness}", f"learner.steps={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        rows, wall_s = train(prepare(seed), seed, Path(folder) / "run", *overrides, timeout_s=CELL_TIMEOUT_S)
    return {"overrides": overrides, "seed": seed, "steps": steps, "commit": commit(), **summarise(rows, wall_s)}


def summarise(rows: list[dict], wall_s: float) -> dict:
    """Accuracy, mismatch and effective sample size of a run; means are over steps."""
    steps = [row for row in rows if "loss/policy" in row]
    curve = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    accuracies = list(curve.values())
    return {
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "accuracy_gain": accuracies[-1] - accuracies[0],
        "accuracy_by_version": curve,
        "mismatch_kl_mean": _mean(steps, "mismatch/kl"),
        "mismatch_kl_max": max(row["mismatch/kl"] for row in steps),
        "mismatch_kl_by_lag": _by_lag(steps, "mismatch/kl"),
        "ess_mean": _mean(steps, "mismatch/ess"),
        "ess_min": min(row["mismatch/ess"] for row in steps),
        "ess_by_lag": _by_lag(steps, "mismatch/ess"),
        "clip_fraction_mean": _mean(steps, "loss/clip_fraction"),
        "clip_fraction_by_lag": _by_lag(steps, "loss/clip_fraction"),
        "staleness_mean": _mean(steps, "staleness/mean_versions"),
        "staleness_max": max(row["staleness/max_versions"] for row in steps),
        "filtered_groups": steps[-1]["ledger/filtered_groups"],
        "stale_groups": steps[-1]["ledger/stale_groups"],
        "reward_first_10": _mean(steps[:10], "reward/mean"),
        "reward_last_10": _mean(steps[-10:], "reward/mean"),
        "wall_s": wall_s,
    }


def _mean(steps: list[dict], name: str) -> float:
    return statistics.fmean(row[name] for row in steps if name in row)


def _by_lag(steps: list[dict], name: str) -> dict[str, float]:
    names = sorted({key for row in steps for key in row if key.startswith(f"{name}_lag")})
    return {key.removeprefix(f"{name}_"): _mean(steps, key) for key in names}


def known_cells(path: Path) -> Cells:
    return json.loads(path.read_text())["figures"] if path.exists() else {}


def write(path: Path, cells: Cells) -> None:
    """Bars hold for what was asked for: six algorithms at three bounds, 100 steps each."""
    asked = [(a, cells.get(a, {}).get(str(s))) for a in ALGORITHMS for s in STALENESS]
    measured = [cell for _, cell in asked if cell is not None and cell["steps"] == STEPS]
    bars = [Bar("cells measured", len(measured), len(asked), "at least")]
    for algorithm, by_staleness in cells.items():
        for staleness, cell in by_staleness.items():
            cell_is = f"{algorithm}, max_staleness={staleness}"
            bars.append(Bar(f"accuracy gain, {cell_is}", cell["accuracy_gain"], GAIN, "at least"))
            bars.append(Bar(f"lag, {cell_is}", cell["staleness_max"], int(staleness), "at most"))
    question = (__doc__ or "").splitlines()[0]
    write_result(path, question=question, figures=cells, peers={}, bars=bars, device=hardware())


def main() -> int:
    every = [f"{algorithm}:{staleness}" for staleness in (2, 0, 8) for algorithm in ALGORITHMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cells", type=cell_name, nargs="+", default=[cell_name(text) for text in every])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = []
    for algorithm, staleness in args.cells:
        cells = known_cells(args.json)
        known = cells.get(algorithm, {}).get(str(staleness), {})
        if (known.get("steps"), known.get("seed")) == (args.steps, args.seed):
            continue
        print(f"---- {algorithm}, max_staleness={staleness}", flush=True)
        try:
            cell = run_cell(algorithm, staleness, args.steps, args.seed)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{algorithm}:{staleness} ({error})")
            continue
        cells = known_cells(args.json)  # another process may have written meanwhile
        cells.setdefault(algorithm, {})[str(staleness)] = cell
        write(args.json, cells)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
