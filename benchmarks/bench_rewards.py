"""Does scoring hold: math answers a second, the sandbox's cost, and rollouts beside a reward that sleeps?

    python benchmarks/bench_rewards.py --json benchmarks/results/bench_rewards.json

Math: groups of 8 answers to one problem, half of them right, no two alike, in one process; beside them math-verify
alone, which parses the reference each time. An endless expression: a group with one, and the same without, in a pool.
Sandbox: a snippet in it, and the same as `python -I -S FILE`, in turns. Sleeping reward: the worker's own path,
`LeaseWork` over the small engine and a `RewardPool`, once with a reward that sleeps 5 s in 10 % of the cases and once
with one that does not, in turns. A group's room is free once it is generated, as in the worker.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from common import Bar, hardware, write_result
from math_answers import GROUP, KINDS, group

from databus.messages import Lease, Sampling
from rewards.config import RewardConfig, SandboxConfig
from rewards.math import math_reward
from rewards.pool import RewardPool
from rewards.sample import Sample
from rewards.sandbox import Sandbox, interpreter
from rollout.config import RolloutConfig
from rollout.engine.small_engine import SmallEngine
from rollout.lease_work import LeaseWork
from rollout.worker import credit_groups

REWARDS = """
import random, time

def quick(sample): return 1.0

def sleepy(sample):
    if random.random() < 0.1: time.sleep(5.0)
    return 1.0
"""
SNIPPETS = {
    "print": "print(1)",
    "work": "print(sum(i * i for i in range(300_000)))",
    "import": "import json, random\nprint(json.dumps([1]))",
}
ENDLESS = "so it is $\\boxed{9^{9^{9^{9}}}}$"
PROMPTS, CONCURRENT = 96, 64
MODEL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
"""A random model: its answers end at `--tokens`, or by chance."""


def library(sample: Sample) -> float:
    from math_verify import parse, verify

    return float(verify(parse(f"${sample.problem['answer']}$"), parse(sample.completion)))


def math_per_s(groups: int) -> dict[str, dict[str, float]]:
    """Answers a second of CPU of one process, by kind of answer and over all: ours, and math-verify's alone."""
    rates: dict[str, dict[str, float]] = {"ours": {}, "math-verify alone": {}}
    totals = dict.fromkeys(rates, 0.0)
    for kind in KINDS:
        for name, score in (("ours", math_reward), ("math-verify alone", library)):
            score(group(kind, 7)[0][0])
            samples = [each for number in range(groups) for each in group(kind, 11 + number)]
            started = time.process_time()
            right = [score(sample) == float(is_right) for sample, is_right in samples]
            spent = time.process_time() - started
            assert all(right) or name != "ours", kind
            totals[name] += spent
            rates[name][kind] = len(samples) / spent
    for name, spent in totals.items():
        rates[name]["all"] = len(KINDS) * groups * GROUP / spent
    return rates


async def endless_expression(folder: Path) -> dict[str, float]:
    """Seconds that a group takes whose answers are all short, and one of whose never ends; both in one process."""
    pool = RewardPool(RewardConfig(function="math", processes=1, timeout_s=20.0), folder)
    samples = [sample for sample, _ in group("polynomial", 11)]
    endless = [*samples[1:], msgspec.structs.replace(samples[0], completion=ENDLESS)]
    try:
        await pool.start()
        await pool.score(samples)
        figures: dict[str, float] = {}
        for name, each in (("without", samples), ("with", endless), ("after", samples)):
            started = time.perf_counter()
            rewards = [parts["reward"] for parts in await pool.score(each)]
            figures[f"{name}_s"] = time.perf_counter() - started
            assert sum(rewards) == (3.0 if name == "with" else 4.0), rewards
        return figures
    finally:
        await pool.close()


def sandbox_overhead(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds, medians, by snippet: in the sandbox, plain, and how much more the former takes."""
    sandbox = Sandbox(SandboxConfig())
    sandbox.start()
    figures: dict[str, dict[str, float]] = {"kind": {sandbox.kind: 1.0}}
    with tempfile.TemporaryDirectory() as folder:
        for name, code in SNIPPETS.items():
            file = Path(folder) / f"{name}.py"
            file.write_text(code)
            walled, plain = [], []
            for _ in range(repeats):
                started = time.perf_counter()
                outcome = sandbox.run(code)
                walled.append(time.perf_counter() - started)
                assert outcome.exit_code == 0
                started = time.perf_counter()
                subprocess.run([interpreter(), "-I", "-S", str(file)], stdout=subprocess.DEVNULL, check=True)
                plain.append(time.perf_counter() - started)
            more = [a - b for a, b in zip(walled, plain, strict=True)]
            medians = {"sandbox_ms": walled, "plain_ms": plain, "overhead_ms": more}
            figures[name] = {key: statistics.median(values) * 1e3 for key, values in medians.items()}
    sandbox.close()
    return figures


async def tokens_per_s(engine: SmallEngine, function: str, folder: Path, tokens: int) -> float:
    """Generated tokens a second while `PROMPTS` groups are made and scored, until the last is generated."""
    pool = RewardPool(RewardConfig(function=f"rewards.py:{function}", processes=4, timeout_s=20.0), folder)
    work = LeaseWork(engine, pool, lambda ids: " ".join(map(str, ids)))
    room = asyncio.Semaphore(credit_groups(CONCURRENT, GROUP, 0.5))
    scoring: set[asyncio.Task[None]] = set()
    generated = asyncio.Event()
    left = PROMPTS

    async def one(number: int) -> None:
        lease = Lease(
            group_id=f"{function}-{number}", cursor=number, attempt=0, purpose="train", prompt="", prompt_ids=(3, 4, 5),
            problem=b"{}", group_size=GROUP, sampling=Sampling(max_tokens=tokens), lease_s=600.0,
        )  # fmt: skip

        def done() -> None:
            nonlocal left
            room.release()
            left -= 1
            if left == 0:
                generated.set()

        await work.run(lease, done)

    try:
        await pool.start()
        before, started = engine.stats().generated_tokens, time.perf_counter()
        for number in range(PROMPTS):
            await room.acquire()
            scoring.add(asyncio.create_task(one(number)))
        await generated.wait()
        return (engine.stats().generated_tokens - before) / (time.perf_counter() - started)
    finally:
        for task in scoring:
            task.cancel()
        await asyncio.gather(*scoring, return_exceptions=True)
        await pool.close()


def write_model(folder: Path) -> str:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**MODEL)).save_pretrained(folder)
    return str(folder)


async def sleeping_reward(rounds: int, tokens: int) -> dict[str, list[float]]:
    config = RolloutConfig(
        engine="small", dtype="float32", max_sequences=CONCURRENT, context_tokens=256, max_tokens=tokens
    )
    figures: dict[str, list[float]] = {"quick": [], "sleepy": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rewards.py").write_text(REWARDS)
        engine = SmallEngine(config, write_model(Path(folder) / "model"), seed=0, version=0)
        await engine.start()
        try:
            await tokens_per_s(engine, "quick", Path(folder), tokens)
            for number in range(rounds):
                for function in ("quick", "sleepy") if number % 2 else ("sleepy", "quick"):
                    figures[function].append(await tokens_per_s(engine, function, Path(folder), tokens))
        finally:
            await engine.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--groups", type=int, default=25, help="of 8 answers, of each kind")
    parser.add_argument("--repeats", type=int, default=200, help="of each snippet")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    rates = math_per_s(args.groups)
    with tempfile.TemporaryDirectory() as folder:
        endless = asyncio.run(endless_expression(Path(folder)))
    sandbox = sandbox_overhead(args.repeats)
    speeds = asyncio.run(sleeping_reward(args.rounds, args.tokens))
    ratios = [sleepy / quick for sleepy, quick in zip(speeds["sleepy"], speeds["quick"], strict=True)]
    worst = max(figures["overhead_ms"] for name, figures in sandbox.items() if name != "kind")
    bars = [
        Bar("math answers/s a core", rates["ours"]["all"], 200, "at least"),
        Bar(
            "seconds that an endless expression costs its group", endless["with_s"] - endless["without_s"], 7, "at most"
        ),
        Bar("sandbox, ms over the snippet's own time", worst, 25, "at most"),
        Bar("rollout tokens/s lost to a sleeping reward, %", 100 * (1 - statistics.median(ratios)), 3, "at most"),
    ]
    figures = {
        "math_answers_per_s": rates["ours"],
        "endless_expression": endless,
        "sandbox": sandbox,
        "rollout_tokens_per_s": speeds,
        "sleepy_over_quick": ratios,
    }
    question = (__doc__ or "").splitlines()[0]
    peers = {"math_answers_per_s": rates["math-verify alone"]}
    write_result(args.json, question=question, figures=figures, peers=peers, bars=bars, device=hardware())
    return 0


if __name__ == "__main__":
    sys.exit(main())
