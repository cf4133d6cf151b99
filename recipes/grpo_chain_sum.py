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


def chain_sum_reward(sample: Sample) -> dict[str, float]:
    """1 for the right sum after the last `#`; a truncated answer is wrong. And up to 0.5 for steps worked right before
    the first wrong one: long chains are hardly ever solved at first, and so still teach something.

    A problem counts as solved from a reward of 1, that is, by its sum alone.
    """
    steps, _, answer = sample.completion.rpartition("#")
    solved = not sample.truncated and answer == sample.problem["answer"]
    return {"answer": float(solved), "steps": 0.5 * share_right(sample.problem["prompt"], steps.split(";"))}


def share_right(prompt: str, steps: list[str]) -> float:
    """Share of the chain's steps that are worked right, up to the first wrong one."""
    total, *operands = map(int, prompt.rstrip("=").split("+"))
    for done, (operand, step) in enumerate(zip(operands, steps, strict=False)):
        if step != f"{total}+{operand}={total + operand}":
            return done / len(operands)
        total += operand
    return min(len(steps), len(operands)) / len(operands)


def recipe() -> RunConfig:
    return RunConfig(
        model=str(TASK / "model"),
        data=DataConfig(train=str(TASK / "train.jsonl"), eval=str(TASK / "eval.jsonl")),
        reward=RewardConfig(function=f"{__file__}:chain_sum_reward"),
        max_staleness=2,
        group_size=16,
        batch_groups=16,
        # Half a batch at a time: of a whole one, the longest groups take more than max_staleness steps, and go stale.
        rollout=RolloutConfig(max_sequences=128, context_tokens=256, max_tokens=128),
        learner=LearnerConfig(steps=100, lr=1e-4, warmup_steps=5, schedule="linear", microbatch_tokens=2048),
        eval=EvalConfig(every=10),
        wandb=WandbConfig(mode="disabled"),
    )
