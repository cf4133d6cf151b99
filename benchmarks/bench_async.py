"""What does running behind buy: trained tokens a second by bound on staleness, and does the accuracy hold?

    python benchmarks/bench_async.py --json benchmarks/results/bench_async.json
    python benchmarks/bench_async.py --json OUT --seeds 0 --staleness 0 2

The demo's recipe with one worker, the same in all but `max_staleness`: 0 waits for each batch and trains it while the
worker stands still, as synchronous trainers do, and is the peer. Its phases give the limit: with generation and
training side by side a step takes max(generation, training), where it took their sum. Where both together want more
cores than there are it cannot: what the processor time of the synchronous run allows is beside it. OUT is written after
every run, and a run that it has is not made again. Bounds are on medians over seeds. Three to seven minutes a run on
two cores.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from cells import Cell, Cells, run_cells
from common import Bar, hardware, write_result

STALENESS = (0, 2, 1, 4, 8)
SEEDS = (0, 1, 2)
STEPS = 100
EVAL_EVERY = 20
SPEEDUP, SHARE_OF_LIMIT, ACCURACY_LOST = 1.25, 0.90, 0.03


def cell(staleness: int, seed: int, steps: int) -> Cell:
    overrides = (f"max_staleness={staleness}", f"learner.steps={steps}", f"eval.every={EVAL_EVERY}")
    return Cell(f"max_staleness={staleness}, seed {seed}", seed, overrides)


def limit(phases: dict) -> float:
    """How many times faster than one after the other both at once can be, if neither slows the other down."""
    parts = phases["wait_s"], phases["train_s"]
    return sum(parts) / max(parts)


def cores_limit(synchronous: dict) -> float:
    """How many times faster than the synchronous run one that does the same work with all cores full can be."""
    return synchronous["step_s"] * (os.cpu_count() or 1) / sum(synchronous["core_s"].values())


def compare(cells: Cells, seeds: tuple[int, ...]) -> dict[str, Any]:
    """By bound: medians over seeds of what a run gave, and of its ratio to the synchronous run of its seed."""
    table: dict[str, Any] = {}
    for staleness in STALENESS:
        pairs = [
            (run, cells.get(cell(0, seed, STEPS).name))
            for seed in seeds
            if (run := cells.get(cell(staleness, seed, STEPS).name)) is not None
        ]
        if not pairs:
            continue
        runs = [run for run, _ in pairs]
        row: dict[str, Any] = {"seeds": len(runs)}
        for name in ("trained_tokens_per_s", "step_s", "train_s", "wait_s", "learner_idle", "staleness_mean"):
            row[name] = statistics.median(run[name] for run in runs)
        for name, index in (("accuracy_before", 0), ("accuracy_after", -1)):
            row[name] = statistics.median(run["curve"][index]["accuracy"] for run in runs)
        against = [(run, synchronous) for run, synchronous in pairs if synchronous is not None]
        if against:
            speedups = [run["trained_tokens_per_s"] / other["trained_tokens_per_s"] for run, other in against]
            row["speedup"] = statistics.median(speedups)
            row["share_of_limit"] = statistics.median(
                speedup / limit(other) for speedup, (_, other) in zip(speedups, against, strict=True)
            )
            row["share_of_cores_limit"] = statistics.median(
                speedup / min(limit(other), cores_limit(other))
                for speedup, (_, other) in zip(speedups, against, strict=True)
            )
            row["core_s"] = statistics.median(sum(run["core_s"].values()) for run in runs)
            row["accuracy_lost"] = statistics.median(
                other["curve"][-1]["accuracy"] - run["curve"][-1]["accuracy"] for run, other in against
            )
        table[f"max_staleness={staleness}"] = row
    return table


def bars(table: dict[str, Any], wanted: int) -> list[Bar]:
    row = table.get("max_staleness=2", {})
    if "speedup" not in row:
        return []
    return [
        Bar("seeds with max_staleness=2 and 0", row["seeds"], wanted, "at least"),
        Bar("trained tokens/s, max_staleness=2 over 0", row["speedup"], SPEEDUP, "at least"),
        Bar("share of the phases' limit", row["share_of_limit"], SHARE_OF_LIMIT, "at least"),
        Bar("final accuracy lost", row["accuracy_lost"], ACCURACY_LOST, "at most"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--staleness", type=int, nargs="+", default=list(STALENESS), choices=STALENESS)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    def write(cells: Cells) -> None:
        table = compare(cells, SEEDS)
        peers = {"synchronous": table.get("max_staleness=0")}
        question = (__doc__ or "").splitlines()[0]
        figures = {"table": table, "cells": cells}
        write_result(
            args.json, question=question, figures=figures, peers=peers, bars=bars(table, len(SEEDS)), device=hardware()
        )

    asked = [cell(staleness, seed, args.steps) for seed in args.seeds for staleness in args.staleness]
    return run_cells(args.json, asked, write)


if __name__ == "__main__":
    sys.exit(main())
