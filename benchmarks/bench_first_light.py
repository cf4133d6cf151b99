"""Does the demo learn, within its bounds, whatever the seed?

    python benchmarks/bench_first_light.py --json benchmarks/results/bench_first_light.json

For each seed: warm start, then `recipes/grpo_chain_sum.py` with real vLLM, as `make demo` runs it; then once with
`max_staleness=0`. Figures are read from each run's metrics.jsonl. About 8 minutes a seed on two cores.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import Bar, hardware, write_result
from demo_run import ECHELON, prepare, train


def summarise(rows: list[dict], wall_s: float) -> dict:
    """The figures of one run that bounds or readers ask for."""
    steps = [row for row in rows if "loss/policy" in row]
    curve = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    accuracies = list(curve.values())
    return {
        "accuracy_by_version": curve,
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "accuracy_gain": accuracies[-1] - accuracies[0],
        "reward_by_step": [round(row["reward/mean"], 4) for row in steps],
        "wall_s": wall_s,
        "first_step_s": steps[0]["time_s"],
        "staleness_max": max(row["staleness/max_versions"] for row in steps),
        "staleness_mean": statistics.fmean(row["staleness/mean_versions"] for row in steps),
        "mismatch_kl_lag0_max": max((row["mismatch/kl_lag0"] for row in steps if "mismatch/kl_lag0" in row), default=0),
        "rollout_tokens_per_s": statistics.median(row["rollout/tokens_per_s"] for row in steps),
        "learner_tokens_per_s": statistics.median(row["learner/tokens_per_s"] for row in steps),
        "step_s": statistics.median(row["learner/step_s"] for row in steps),
        "wait_s": statistics.median(row["learner/wait_s"] for row in steps),
    }


def help_s() -> float:
    """Median seconds of `echelon --help` over nine runs."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        subprocess.run([str(ECHELON), "--help"], check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for seed in args.seeds:
            runs[f"seed {seed}"] = summarise(*train(prepare(seed), seed, Path(folder) / f"seed{seed}"))
        first = args.seeds[0]
        on_policy = summarise(
            *train(prepare(first), first, Path(folder) / "on-policy", "max_staleness=0", "learner.steps=10")
        )
    figures = {"runs": runs, "on_policy": on_policy, "help_s": help_s()}
    every = list(runs.values())
    bars = [
        Bar("accuracy before, lowest", min(r["accuracy_before"] for r in every), 0.30, "at least"),
        Bar("accuracy before, highest", max(r["accuracy_before"] for r in every), 0.70, "at most"),
        Bar("accuracy gain, smallest", min(r["accuracy_gain"] for r in every), 0.15, "at least"),
        Bar("run wall time, longest, s", max(r["wall_s"] for r in every), 480, "at most"),
        Bar("lag, max_staleness=2", max(r["staleness_max"] for r in every), 2, "at most"),
        Bar("lag, max_staleness=0", on_policy["staleness_max"], 0, "at most"),
        Bar("mismatch KL at lag 0", max(r["mismatch_kl_lag0_max"] for r in [*every, on_policy]), 1e-4, "at most"),
        Bar("first step after the roles are up, s", max(r["first_step_s"] for r in every), 20, "at most"),
        Bar("echelon --help, s", figures["help_s"], 0.3, "at most"),
    ]
    question = (__doc__ or "").splitlines()[0]
    write_result(args.json, question=question, figures=figures, peers={}, bars=bars, device=hardware())


if __name__ == "__main__":
    main()
