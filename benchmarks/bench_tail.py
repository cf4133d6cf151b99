"""Do difficulty-aware batching and drafting bring a run to its accuracy sooner?

    python benchmarks/bench_tail.py --json benchmarks/results/bench_tail.json

The demo's recipe four times a seed: `scheduling.mixing` and `draft.policy` on and off. The target is what the demo
promises, the warm start's accuracy + 0.15; seconds to it are between the versions evaluated, by a straight line.
Idle share: of the learner's time, between steps. OUT is written after every run, and a run that it has is not made
again.
"""

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from cells import Cell, Cells, run_cells
from common import Bar, hardware, write_result

SEEDS = (0, 1, 2)
STEPS = 100
EVAL_EVERY = 10
GAIN = 0.15
MIXING = {"mixed": "scheduling.mixing=true", "unmixed": "scheduling.mixing=false"}
DRAFTING = {"drafting": "draft.policy=logarithmic", "no drafts": "draft.policy=off"}


def kind_of(mixing: str, drafting: str) -> str:
    return f"{mixing}, {drafting}"


def cells_of(seed: int, steps: int) -> list[Cell]:
    return [
        Cell(
            f"{kind_of(mixing, drafting)}, seed {seed}",
            seed,
            (MIXING[mixing], DRAFTING[drafting], f"learner.steps={steps}", f"eval.every={EVAL_EVERY}"),
        )
        for mixing in MIXING
        for drafting in DRAFTING
    ]


def seconds_to_target(curve: list[dict]) -> float | None:
    """Since all roles were up; None where the target was not reached."""
    target = curve[0]["accuracy"] + GAIN
    for before, after in pairwise(curve):
        if after["accuracy"] >= target:
            share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before["time_s"] + share * (after["time_s"] - before["time_s"])
    return None


def compare(cells: Cells) -> dict[str, Any]:
    """By kind: medians over the seeds that were run."""
    table: dict[str, Any] = {}
    for mixing in MIXING:
        for drafting in DRAFTING:
            kind = kind_of(mixing, drafting)
            runs = [run for name, run in cells.items() if name.startswith(f"{kind}, seed ")]
            if not runs:
                continue
            times = [seconds_to_target(run["curve"]) for run in runs]
            reached = [time for time in times if time is not None]
            table[kind] = {
                "seeds": len(runs),
                "seeds_that_reached_it": len(reached),
                "seconds_to_target": statistics.median(reached) if reached else None,
                **{
                    name: statistics.median(run[name] for run in runs)
                    for name in ("learner_idle", "step_s", "trained_tokens_per_s", "accepted_per_round", "stale_groups")
                },
            }
    return table


def bars(table: dict[str, Any]) -> list[Bar]:
    reached = sum(row["seeds_that_reached_it"] for row in table.values())
    return [
        Bar("runs that reached the demo's target", reached, sum(row["seeds"] for row in table.values()), "at least")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    def write(cells: Cells) -> None:
        table = compare(cells)
        question = (__doc__ or "").splitlines()[0]
        peers = {"neither": table.get(kind_of("unmixed", "no drafts"))}
        figures = {"table": table, "cells": cells}
        write_result(args.json, question=question, figures=figures, peers=peers, bars=bars(table), device=hardware())

    return run_cells(args.json, [cell for seed in args.seeds for cell in cells_of(seed, args.steps)], write)


if __name__ == "__main__":
    sys.exit(main())
