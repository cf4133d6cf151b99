"""Does scoring hold: math answers a second, the sandbox's cost, and rollouts beside a reward that sleeps?

    python benchmarks/bench_rewards.py --json benchmarks/results/bench_rewards.json

Sleeping reward: the worker's own path, `LeaseWork` over the small engine and a `RewardPool`, once with a reward that
sleeps 5 s in 10 % of the cases and once with one that does not, in turns. A group's room is free once it is
generated, as in the worker. Sandbox: a snippet in it, and the same as `python -I -S FILE`, in turns.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Bar, hardware, write_result

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
ANSWERS = (
    ("so she has #### 42", "She has <<6*7=42>>42\n#### 42"),
    ("Therefore the answer is $\\boxed{42}$.", "42"),
    ("which gives \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
    ("The answer is 1,024.", "1024"),
    ("Thus $x = \\boxed{-\\frac{5}{2}}$.", "-2.5"),
)
TEXT = "We look at the problem one step at a time. " * 40
SNIPPETS = {
    "print": "print(1)",
    "work": "print(sum(i * i for i in range(300_000)))",
    "import": "import json, random\nprint(json.dumps([1]))",
}
GROUP, PROMPTS, CONCURRENT = 8, 96, 64


def math_per_s(repeats: int) -> dict[str, float]:
    """Answers a second of CPU of one process, by kind of answer and over all."""
    rates: dict[str, float] = {}
    total = 0.0
    for completion, answer in ANSWERS:
        samples = [
            Sample(
                prompt="",
                completion=TEXT + " " * n + completion,
                problem={"answer": answer},
                num_tokens=1,
                truncated=False,
            )
            for n in range(repeats)
        ]
        assert math_reward(samples[0]) == 1.0, (completion, answer)
        started = time.process_time()
        for sample in samples:
            math_reward(sample)
        total += time.process_time() - started
        rates[completion[:24]] = repeats / (time.process_time() - started)
    return rates | {"all": len(ANSWERS) * repeats / total}


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


async def sleeping_reward(model: str, rounds: int, tokens: int) -> dict[str, list[float]]:
    config = RolloutConfig(
        engine="small", dtype="float32", max_sequences=CONCURRENT, context_tokens=256, max_tokens=tokens
    )
    engine = SmallEngine(config, model, seed=0, version=0)
    await engine.start()
    figures: dict[str, list[float]] = {"quick": [], "sleepy": []}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rewards.py").write_text(REWARDS)
        try:
            for number in range(rounds):
                for function in ("quick", "sleepy") if number % 2 else ("sleepy", "quick"):
                    figures[function].append(await tokens_per_s(engine, function, Path(folder), tokens))
        finally:
            await engine.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default=".cache/chain_sum/model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    rates = math_per_s(args.repeats)
    sandbox = sandbox_overhead(args.repeats)
    speeds = asyncio.run(sleeping_reward(args.model, args.rounds, args.tokens))
    ratios = [sleepy / quick for sleepy, quick in zip(speeds["sleepy"], speeds["quick"], strict=True)]
    worst = max(figures["overhead_ms"] for name, figures in sandbox.items() if name != "kind")
    bars = [
        Bar("math answers/s a core", rates["all"], 200, "at least"),
        Bar("sandbox, ms over the snippet's own time", worst, 25, "at most"),
        Bar("rollout tokens/s lost to a sleeping reward, %", 100 * (1 - statistics.median(ratios)), 3, "at most"),
    ]
    figures = {
        "math_answers_per_s": rates,
        "sandbox": sandbox,
        "rollout_tokens_per_s": speeds,
        "sleepy_over_quick": ratios,
    }
    question = (__doc__ or "").splitlines()[0]
    write_result(args.json, question=question, figures=figures, peers={}, bars=bars, device=hardware())
    return 0


if __name__ == "__main__":
    sys.exit(main())
