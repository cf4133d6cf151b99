"""GRPO on chain sums: a 0.8 M-parameter model learns to add up long chains, on two CPU cores.

    python recipes/prepare_chain_sum.py --out .cache/chain_sum
    echelon run recipes/grpo_chain_sum.py

`3+5+8=` is to be answered `3+5=8;8+8=16;#16`. Ran on: 2 CPU cores, about 6 minutes. With a GPU, add
`rollout.device=cuda learner.device=cuda`.
"""

from pathlib import Path

from echelon.config import DataConfig, EvalConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rewards.sample import Sample
from rollout.config import RolloutConfig

TASK = Path(".cache/chain_sum")


def chain_sum_reward(sample: Sample) -> float:
    """1 where the text after the last `#` is the sum, else 0; a truncated answer is wrong."""
    answer = sample.completion.rpartition("#")[2]
    return float(not sample.truncated and answer == sample.problem["answer"])


def recipe() -> RunConfig:
    return RunConfig(
        model=str(TASK / "model"),
        data=DataConfig(train=str(TASK / "train.jsonl"), eval=str(TASK / "eval.jsonl")),
        reward=RewardConfig(function=f"{__file__}:chain_sum_reward"),
        max_staleness=2,
        group_size=16,
        batch_groups=16,
        rollout=RolloutConfig(max_sequences=256, context_tokens=256, max_tokens=128),
        learner=LearnerConfig(steps=100, lr=1e-4, warmup_steps=5, schedule="linear", microbatch_tokens=2048),
        eval=EvalConfig(every=10),
        wandb=WandbConfig(mode="disabled"),
    )
