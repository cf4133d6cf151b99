"""How long after the learner is killed does a run take its next step?

    python benchmarks/bench_restart.py --json benchmarks/results/bench_restart.json

A run with the small engine on a tiny model, with a checkpoint every step. The learner's process gets SIGKILL; the clock
stops when the first step that had not been taken yet has its row in metrics.jsonl. The bound leaves out the time that
loading the model takes by itself, in a fresh process that has imported what the learner imports. Beside it: checkpoints
20 steps apart, the learner killed after 15 more, without and with a copy in shared memory every step.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from common import Bar, hardware, write_result

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120.0
LEARNER = "echelon.roles.learner"
RECIPE = """
from echelon.config import DataConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig

def reward(sample):
    return float(sample.completion.count("1"))

def recipe():
    return RunConfig(
        model={model!r},
        data=DataConfig(train={train!r}),
        reward=RewardConfig(function=f"{{__file__}}:reward"),
        group_size=4,
        batch_groups=4,
        rollout=RolloutConfig(engine="small", max_sequences=32, context_tokens=64, max_tokens=12),
        learner=LearnerConfig(steps=100_000, checkpoint_every={every}, memory_copy_every={copies}),
        wandb=WandbConfig(mode="disabled"),
    )
"""
FAR, AFTER = 20, 15
"""Steps between checkpoints that are far apart, and steps after one when the learner is killed."""
LOAD = """
import sys, time
import learner.run
from transformers import AutoModelForCausalLM
started = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(time.perf_counter() - started)
"""


def write_recipe(folder: Path, task: Path, every: int, copies: int) -> Path:
    recipe = folder / "restart.py"
    model, train = str(task / "model"), str(task / "train.jsonl")
    recipe.write_text(RECIPE.format(model=model, train=train, every=every, copies=copies))
    return recipe


def load_s(model: Path) -> float:
    """Seconds that loading the model takes."""
    command = [sys.executable, "-c", LOAD, str(model)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE_S).stdout)


def steps(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if run.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run does not go on (exit code {run.poll()})")
        time.sleep(0.02)


def learner_process(run: subprocess.Popen[bytes]) -> psutil.Process:
    for process in psutil.Process(run.pid).children(recursive=True):
        words = process.cmdline()
        if "-m" in words and words[words.index("-m") + 1] == LEARNER:
            return process
    raise RuntimeError("the run has no learner")


def restart_s(run: subprocess.Popen[bytes], run_dir: Path, every: int) -> float:
    """Kill the learner, and wait for a step that is new."""
    ready = steps(run_dir) + 3
    if every > 1:
        ready += (AFTER - ready) % every
    wait_for(lambda: steps(run_dir) >= ready, run)
    victim = learner_process(run)
    killed, done = time.perf_counter(), steps(run_dir)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(PATIENCE_S)
    done = max(done, steps(run_dir))
    wait_for(lambda: steps(run_dir) > done, run)
    return time.perf_counter() - killed


def measure(task: Path, repeats: int, every: int = 1, copies: int = 0) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        recipe = write_recipe(Path(folder), task, every, copies)
        command = [sys.executable, "-m", "echelon", "run", str(recipe), "--run-dir", str(run_dir)]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: steps(run_dir) > 0, run)
            return [restart_s(run, run_dir, every) for _ in range(repeats)]
        finally:
            run.send_signal(signal.SIGINT)
            run.wait(PATIENCE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--task", type=Path, default=ROOT / ".cache" / "chain_sum", help="of `make demo`")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not (args.task / "train.jsonl").exists():
        parser.error(f"{args.task} has no train.jsonl: make it with recipes/prepare_chain_sum.py")
    times, loading = measure(args.task, args.repeats), load_s(args.task / "model")
    far = measure(args.task, args.repeats, FAR)
    copies = measure(args.task, args.repeats, FAR, copies=1)
    print(json.dumps({"restart_s": times, "load_s": loading, "far_s": far, "copies_s": copies}))
    write_result(
        args.json,
        question=(__doc__ or "").splitlines()[0],
        figures={
            "restart_s": times,
            "median_s": statistics.median(times),
            "model_load_s": loading,
            "checkpoints_far_apart_s": far,
            "and_copies_in_memory_s": copies,
        },
        peers={"copies in memory, times as fast": statistics.median(far) / statistics.median(copies)},
        bars=[Bar("kill to next step, beyond loading the model, longest, s", max(times) - loading, 10, "at most")],
        device=hardware(),
    )


if __name__ == "__main__":
    main()
