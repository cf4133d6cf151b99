"""Runs of the demo's recipe: the warm start, `echelon run`, and the rows that it wrote."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ECHELON = Path(sys.executable).with_name("echelon")
RECIPE = "recipes/grpo_chain_sum.py"


def prepare(seed: int) -> Path:
    """The task's folder; made once a seed (about 90 s)."""
    task = ROOT / ".cache" / f"chain_sum_seed{seed}"
    command = [sys.executable, "recipes/prepare_chain_sum.py", "--out", str(task), "--seed", str(seed)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return task


def train(task: Path, seed: int, run_dir: Path, *overrides: str, timeout_s: float = 1800.0) -> tuple[list[dict], float]:
    """One run of the demo's recipe: its metrics, and the wall time from the command to its end."""
    settings = [f"seed={seed}", f"model={task / 'model'}"]
    settings += [f"data.{split}={task / split}.jsonl" for split in ("train", "eval")]
    started = time.perf_counter()
    command = [str(ECHELON), "run", RECIPE, "--run-dir", str(run_dir), *settings, *overrides]
    subprocess.run(command, cwd=ROOT, check=True, timeout=timeout_s)
    elapsed = time.perf_counter() - started
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], elapsed
