"""Whole runs on an NVIDIA GPU: learner and engine on CUDA, in fp32 and in bf16."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
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
        group_size=8,
        batch_groups=4,
        rollout=RolloutConfig(device="cuda", max_sequences=32, context_tokens=128, max_tokens=64,
                              gpu_memory_fraction=0.3),
        learner=LearnerConfig(steps=4, lr=1e-4, device="cuda"),
        wandb=WandbConfig(mode="disabled"),
    )
"""


@pytest.mark.parametrize(
    ("engine", "dtype", "kl", "placement", "backend"),
    [
        ("small", "float32", 1e-4, "separate", "bus"),
        ("vllm", "float32", 1e-4, "separate", "bus"),
        ("vllm", "bfloat16", 5e-3, "separate", "bus"),
        ("vllm", "bfloat16", 5e-3, "separate", "ipc"),
        ("vllm", "bfloat16", 5e-3, "separate", "nccl"),  # on one GPU, where NCCL takes no two ranks: over the bus
        ("small", "float32", 1e-4, "colocated", "bus"),
        ("vllm", "float32", 1e-4, "colocated", "bus"),
        ("vllm", "bfloat16", 5e-3, "colocated", "bus"),
    ],
)
def test_run_on_cuda(
    tiny_model: Path, tmp_path: Path, engine: str, dtype: str, kl: float, placement: str, backend: str
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(9) for b in range(9)))
    recipe = tmp_path / "cuda_recipe.py"
    recipe.write_text(RECIPE.format(model=str(tiny_model), train=str(train)))
    settings = [
        f"rollout.engine={engine}",
        f"rollout.dtype={dtype}",
        f"learner.dtype={dtype}",
        f"placement={placement}",
        f"weights.backend={backend}",
    ]
    command = [sys.executable, "-m", "echelon", "run", str(recipe), "--run-dir", str(tmp_path / "run"), *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert max(row["staleness/max_versions"] for row in rows) <= 2
    assert max(row.get("mismatch/kl_lag0", 0.0) for row in rows) < kl
    log = (tmp_path / "run" / "logs" / "worker-0.log").read_text()
    if backend == "ipc":
        assert "over the bus" not in log and "from host memory" not in log, log
