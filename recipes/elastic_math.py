"""Separate budgets for thinking and for the solution (Elastic Reasoning), with DeepSeek-R1-Distill-Qwen-1.5B on maths.

    echelon run recipes/elastic_math.py rollout.device=cuda learner.device=cuda

Where thinking has not ended after 1,024 tokens its end is forced, and the solution has 1,024 of its own; forced tokens
bear no loss. Not yet run at this size: tested for two steps with a tiny model on a file in the data set's schema.
Needs one or two NVIDIA GPUs and the hub. Method: arXiv:2505.05315; the other settings are ours. Other budgets:
`rollout.reasoning.thinking_tokens=4096 rollout.max_tokens=5632 rollout.context_tokens=6656`.
"""

import msgspec

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rewards.math import math_reward
from rewards.sample import Sample
from rollout.config import ReasoningConfig, RolloutConfig

END = "</think>"


def solution_reward(sample: Sample) -> float:
    """The `math` reward of what follows the thinking: a box within it is no answer yet."""
    solution = sample.completion.rpartition(END)[2]
    return math_reward(msgspec.structs.replace(sample, completion=solution))


def recipe() -> RunConfig:
    return RunConfig(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        data=DataConfig(
            train="agentica-org/DeepScaleR-Preview-Dataset",
            eval="HuggingFaceH4/MATH-500",
            prompt="{problem}\nReason step by step, and put the final answer within \\boxed{{}}.",
            chat=True,
        ),
        reward=RewardConfig(function=f"{__file__}:solution_reward", processes=4),
        max_staleness=2,
        group_size=8,
        batch_groups=64,
        rollout=RolloutConfig(
            dtype="bfloat16",
            max_sequences=256,
            context_tokens=3584,
            max_tokens=2560,
            enforce_eager=False,
            reasoning=ReasoningConfig(thinking_tokens=1024, solution_tokens=1024, end=END),
        ),
        learner=LearnerConfig(
            steps=200, lr=1e-6, warmup_steps=10, dtype="bfloat16", microbatch_tokens=8192, gradient_checkpointing=True
        ),
        eval=EvalConfig(every=25),
    )
