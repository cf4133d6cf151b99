"""GRPO with a tool: Qwen2.5-1.5B-Instruct learns when to ask a calculator.

    python recipes/prepare_tools.py --out .cache/tools
    echelon run recipes/grpo_tools.py rollout.device=cuda learner.device=cuda

An episode has up to six turns; the chat template tells the model of the calculator, whose answers bear no loss. Not yet
run at this size: tested for two steps with a tiny model on this data. Needs one or two NVIDIA GPUs and the hub (or
`model=DIR`).
"""

import re
from pathlib import Path

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rewards.sample import Sample
from rollout.config import EnvironmentConfig, RolloutConfig

TASK = Path(".cache/tools")
ANSWER = re.compile(r"\\boxed\{([^{}]*)\}")


def answer_reward(sample: Sample) -> dict[str, float]:
    """1 for the right number in the last box of the last turn. A model that never asks may be right, too."""
    boxes = [] if sample.truncated else ANSWER.findall(sample.completion)
    return {"answer": float(bool(boxes) and boxes[-1].replace(",", "").strip() == sample.problem["answer"])}


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        data=DataConfig(
            train=str(TASK / "train.jsonl"),
            eval=str(TASK / "eval.jsonl"),
            prompt="{question}\nUse the calculator, and put the final answer within \\boxed{{}}.",
            chat=True,
        ),
        reward=RewardConfig(function=f"{__file__}:answer_reward"),
        max_staleness=2,
        group_size=8,
        batch_groups=32,
        rollout=RolloutConfig(
            dtype="bfloat16",
            max_sequences=256,
            context_tokens=2048,
            max_tokens=1536,
            enforce_eager=False,
            environment=EnvironmentConfig(name="calculator", max_turns=6, output_tokens=128),
        ),
        learner=LearnerConfig(
            steps=200, lr=1e-6, warmup_steps=10, dtype="bfloat16", microbatch_tokens=8192, gradient_checkpointing=True
        ),
        eval=EvalConfig(every=25),
    )
