"""GRPO on GSM8K with Qwen2.5-0.5B-Instruct: the usual first experiment of the field.

    echelon run recipes/grpo_gsm8k.py rollout.device=cuda learner.device=cuda

Not yet run at this size: tested for two steps with a tiny model on a file in GSM8K's schema. Needs one or two
NVIDIA GPUs and the hub (or the same files on disk: `model=DIR data.train=FILE.parquet
data.eval=FILE.parquet`). The reward is math-verify's on the final answer.
"""

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        data=DataConfig(
            train="openai/gsm8k",
            eval="openai/gsm8k",
            subset="main",
            prompt="{question}\nReason step by step, and put the final answer within \\boxed{{}}.",
            chat=True,
            max_eval=512,
        ),
        reward=RewardConfig(function="math", processes=2, timeout_s=10),
        max_staleness=2,
        group_size=8,
        batch_groups=32,
        rollout=RolloutConfig(
            dtype="bfloat16", max_sequences=256, context_tokens=1536, max_tokens=1024, enforce_eager=False
        ),
        learner=LearnerConfig(
            steps=200,
            lr=1e-6,
            warmup_steps=10,
            dtype="bfloat16",
            microbatch_tokens=8192,
            gradient_checkpointing=True,
            checkpoint_every=50,
        ),
        eval=EvalConfig(every=25),
    )
