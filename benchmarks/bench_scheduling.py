"""How much sooner is a long-tailed batch done when it is scheduled by predicted length?

    python benchmarks/bench_scheduling.py --json benchmarks/results/bench_scheduling.json

A batch of N groups of G requests on one worker of S slots, in three ways: first come, first served under whole-group
credit (how this trainer leased before: a group's place falls free when its last request ends); first come, first
served with all requests handed to the engine at once; and scheduled, that is longest predicted first, with as many
groups waiting in the engine as run (`rollout.ahead` 1). Predictions are the difficulty model's after one earlier epoch
of other draws from the same problems; with true lengths in their place the figure is the oracle's. Makespans are
simulated with a step latency fitted to real vLLM, then three batches are run on that engine with imposed lengths.
"fcfs, all at once / lower bound" is the most that any order could gain over plain first come, first served.
About 5 minutes on two cores.
"""

import argparse
import asyncio
import os
import random
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import Bar, hardware, write_result
from engine_steps import CONTEXT_TOKENS, ImposedEngine, StepLatency
from makespan import Order, lower_bound_s, makespan_s

from databus.codec import Array
from rollout.scheduling.difficulty import DifficultyModel
from rollout.worker import credit_groups

ROOT = Path(__file__).resolve().parents[1]
GROUP_SIZE, SLOTS, FORGETTING = 8, 32, 0.5
BATCHES = {"16 groups": 16, "32 groups": 32}
"""Four and eight times as many requests as slots: with fewer the longest request decides, with more the total."""
NUM_PROBLEMS, PROMPT_TOKENS = 256, 16
SEEDS = range(20)
MAX_TOKENS = CONTEXT_TOKENS - PROMPT_TOKENS
ENGINE_DISTRIBUTION, ENGINE_BATCH, ENGINE_SEEDS = "lognormal, like mathematics", "16 groups", range(3)

Sampler = Callable[[np.random.Generator], Array]


def lognormal(median: float, between: float, within: float) -> Callable[[np.random.Generator], tuple[Sampler, Array]]:
    """Problems whose log lengths spread by `between`, completions of one problem by `within`."""

    def problems(rng: np.random.Generator) -> tuple[Sampler, Array]:
        centre = np.log(median) + between * rng.normal(size=(NUM_PROBLEMS, 1))

        def sample(rng: np.random.Generator) -> Array:
            tokens = np.exp(centre + within * rng.normal(size=(NUM_PROBLEMS, GROUP_SIZE)))
            return np.clip(tokens, 2, MAX_TOKENS).astype(int)

        return sample, np.full(NUM_PROBLEMS, PROMPT_TOKENS)

    return problems


def chain_sum(rng: np.random.Generator) -> tuple[Sampler, Array]:
    """The lengths of right answers of `recipes/prepare_chain_sum.py`, an eighth of them cut short or run over."""
    task = runpy.run_path(str(ROOT / "recipes" / "prepare_chain_sum.py"))
    chains = random.Random(int(rng.integers(1 << 30)))
    problems = task["draw_problems"](chains, NUM_PROBLEMS, set())
    right = np.array([[len(each["solution"]) + 1] for each in problems])

    def sample(rng: np.random.Generator) -> Array:
        wrong = rng.random((NUM_PROBLEMS, GROUP_SIZE)) < 1 / 8
        return np.maximum(2, np.where(wrong, right * rng.uniform(0.5, 1.5, wrong.shape), right)).astype(int)

    return sample, np.array([len(each["prompt"]) for each in problems])


DISTRIBUTIONS = {
    "lognormal, like mathematics": lognormal(80, 0.8, 0.3),
    "lognormal, noisy within a problem": lognormal(80, 0.6, 0.5),
    "lognormal, heavy": lognormal(60, 1.1, 0.3),
    "chain-sum": chain_sum,
}


def make_batch(distribution: str, num_groups: int, seed: int) -> tuple[Array, Array]:
    """(lengths [N, G] of a batch's groups, their predicted lengths [N]) after one earlier epoch."""
    rng = np.random.default_rng(seed)
    sample, prompt_tokens = DISTRIBUTIONS[distribution](rng)
    model = DifficultyModel(prompt_tokens, FORGETTING)
    for problem, lengths in enumerate(sample(rng)):
        model.observe(problem, lengths, np.ones(GROUP_SIZE, bool))
    chosen = rng.permutation(NUM_PROBLEMS)[:num_groups]
    return sample(rng)[chosen], model.mean_tokens(chosen)


def orders(lengths: Array, predicted: Array) -> dict[str, Order]:
    count = len(lengths)
    came, same = list(range(count)), np.zeros(count)
    room, ahead = credit_groups(SLOTS, GROUP_SIZE, 0.0), credit_groups(SLOTS, GROUP_SIZE, 1.0)
    return {
        "fcfs, whole-group credit": Order(came, room, same),
        "fcfs, all at once": Order(came, count, same),
        "scheduled": longest_first(predicted, ahead),
        "oracle": longest_first(lengths.mean(axis=1), ahead),
    }


def longest_first(predicted: Array, credit: int) -> Order:
    """As the mixer gives out a batch and the engine begins requests (`BeginOrder`): age counts as well."""
    groups = np.argsort(-predicted, kind="stable").tolist()
    priorities = predicted.astype(float).copy()
    for place, group in enumerate(groups):
        priorities[group] -= place * GROUP_SIZE * MAX_TOKENS / SLOTS
    return Order(groups, credit, priorities)


def simulate(latency: StepLatency) -> dict[str, dict[str, Any]]:
    """Medians over seeds, by distribution and batch."""
    figures: dict[str, dict[str, Any]] = {}
    for distribution in DISTRIBUTIONS:
        for name, num_groups in BATCHES.items():
            runs = [compare(latency, *make_batch(distribution, num_groups, seed)) for seed in SEEDS]
            figures[f"{distribution}, {name}"] = summary(runs)
    return figures


def compare(latency: StepLatency, lengths: Array, predicted: Array) -> dict[str, float]:
    bound = lower_bound_s(lengths, SLOTS, latency, PROMPT_TOKENS)
    times = {
        name: makespan_s(lengths, order, SLOTS, latency, PROMPT_TOKENS)
        for name, order in orders(lengths, predicted).items()
    }
    errors = np.abs(predicted - lengths.mean(axis=1)).mean() / lengths.mean()
    return relative(times) | {
        "scheduled / lower bound": times["scheduled"] / bound,
        "oracle / lower bound": times["oracle"] / bound,
        "fcfs, all at once / lower bound": times["fcfs, all at once"] / bound,
        "prediction error ratio": float(errors),
    }


def relative(times: dict[str, float]) -> dict[str, float]:
    return {
        "fcfs / scheduled": times["fcfs, whole-group credit"] / times["scheduled"],
        "fcfs, all at once / scheduled": times["fcfs, all at once"] / times["scheduled"],
        "fcfs / oracle": times["fcfs, whole-group credit"] / times["oracle"],
        "fcfs, all at once / oracle": times["fcfs, all at once"] / times["oracle"],
    }


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median, and the spread from the 10th to the 90th percentile."""
    figures: dict[str, Any] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        low, high = np.quantile(values, [0.1, 0.9])
        figures[name] = {"median": statistics.median(values), "p10": float(low), "p90": float(high)}
    return figures


async def run_order(engine: ImposedEngine, lengths: Array, order: Order, predicted: Array) -> float:
    return await engine.run_groups_s(
        [lengths[group].tolist() for group in order.groups],
        [round(float(predicted[group])) for group in order.groups],
        order.credit,
    )


async def on_the_engine(model: Path) -> tuple[StepLatency, dict[str, float], list[dict[str, float]]]:
    """(latency, what it was fitted to, real makespans of a few batches with what the simulation said)."""
    engine = ImposedEngine(model, SLOTS, MAX_TOKENS)
    await engine.start()
    try:
        latency, fitted = await engine.fit(repeats=2)
        runs = [await measure(engine, latency, seed) for seed in ENGINE_SEEDS]
        return latency, fitted, runs
    finally:
        await engine.close()


async def measure(engine: ImposedEngine, latency: StepLatency, seed: int) -> dict[str, float]:
    """One batch in all orders, in turn and twice, the second time backwards; of each the faster run counts.

    The machine's speed may have changed since the fit: the lower bound is scaled by how much slower than simulated
    the batch was, in the median over the orders.
    """
    lengths, predicted = make_batch(ENGINE_DISTRIBUTION, BATCHES[ENGINE_BATCH], seed)
    told = {"scheduled": predicted, "oracle": lengths.mean(axis=1)}
    none = np.ones(len(lengths))
    all_orders = orders(lengths, predicted)
    real: dict[str, list[float]] = {name: [] for name in all_orders}
    for name in [*all_orders, *reversed(all_orders)]:
        real[name].append(await run_order(engine, lengths, all_orders[name], told.get(name, none)))
    best = {name: min(times) for name, times in real.items()}
    simulated = {name: makespan_s(lengths, order, SLOTS, latency, PROMPT_TOKENS) for name, order in all_orders.items()}
    slower = statistics.median(best[name] / simulated[name] for name in best)
    bound = slower * lower_bound_s(lengths, SLOTS, latency, PROMPT_TOKENS)
    return (
        {f"{name}, s": seconds for name, seconds in best.items()}
        | {f"{name}, slower run, s": max(times) for name, times in real.items()}
        | {f"{name}, simulated s": seconds for name, seconds in simulated.items()}
        | relative(best)
        | {"real / simulated": slower, "lower bound, s": bound, "scheduled / lower bound": best["scheduled"] / bound}
    )


def prepare() -> Path:
    task = ROOT / ".cache" / "chain_sum"
    command = [sys.executable, "recipes/prepare_chain_sum.py", "--out", str(task), "--seed", "0"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return task / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a chain-sum model; without it one is made")
    args = parser.parse_args()
    latency, fitted, runs = asyncio.run(on_the_engine(args.model or prepare()))
    simulated = simulate(latency)
    engine = summary(runs)

    def medians(name: str) -> list[float]:
        return [workload[name]["median"] for workload in simulated.values()]

    bars = [
        Bar("fcfs / scheduled, median of workloads", statistics.median(medians("fcfs / scheduled")), 1.25, "at least"),
        Bar("fcfs / scheduled, worst workload", min(medians("fcfs / scheduled")), 1.25, "at least"),
        Bar(
            "fcfs, all at once / scheduled, median of workloads",
            statistics.median(medians("fcfs, all at once / scheduled")),
            1.25,
            "at least",
        ),
        Bar(
            "fcfs, all at once / scheduled, best workload",
            max(medians("fcfs, all at once / scheduled")),
            1.25,
            "at least",
        ),
        Bar("scheduled / lower bound, worst workload", max(medians("scheduled / lower bound")), 1.10, "at most"),
        Bar("fcfs / scheduled, real engine", engine["fcfs / scheduled"]["median"], 1.25, "at least"),
        Bar(
            "fcfs, all at once / scheduled, real engine",
            engine["fcfs, all at once / scheduled"]["median"],
            1.25,
            "at least",
        ),
        Bar("scheduled / lower bound, real engine", engine["scheduled / lower bound"]["median"], 1.10, "at most"),
    ]
    figures = {
        "slots": SLOTS,
        "group_size": GROUP_SIZE,
        "load_average": os.getloadavg(),
        "latency": asdict(latency),
        "step_s": fitted,
        "scheduled": simulated,
        "engine": {"summary": engine, "runs": runs},
    }
    peers = {
        "fcfs, whole-group credit": "groups leased in the order of the data; a place falls free with the last request",
        "fcfs, all at once": "vLLM's own order, all requests queued",
        "oracle": "scheduled by true mean lengths",
    }
    question = (__doc__ or "").splitlines()[0]
    write_result(args.json, question=question, figures=figures, peers=peers, bars=bars, device=hardware())


if __name__ == "__main__":
    main()
