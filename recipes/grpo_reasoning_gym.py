"""GRPO on generated problems of reasoning-gym with Qwen2.5-1.5B-Instruct; most of the reward is the verifier's.

    echelon run recipes/grpo_reasoning_gym.py rollout.device=cuda learner.device=cuda

Not yet run at this size: tested for two steps with a tiny model. Needs one or two NVIDIA GPUs; the problems are
generated when the run starts. Other tasks: `data.train=reasoning_gym:countdown,mini_sudoku`, `data.eval` likewise.
"""

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import FormatConfig, RewardConfig, RewardPart
from rollout.config import RolloutConfig

TASKS = "reasoning_gym:chain_sum,leg_counting,spell_backward,simple_equations"


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        data=DataConfig(
            train=TASKS,
            eval=TASKS,
            prompt="{question}\nThink step by step, then give the answer alone within <answer> and </answer>.",
            chat=True,
            max_train=20000,
            max_eval=400,
        ),
        reward=RewardConfig(
            parts=(
                RewardPart(function="reasoning_gym", weight=1.0),
                RewardPart(function="format", weight=0.1),
            ),
            format=FormatConfig(pattern=r".*<answer>[^<]+</answer>\s*"),
            processes=2,
        ),
        max_staleness=2,
        group_size=8,
        batch_groups=32,
        rollout=RolloutConfig(
            dtype="bfloat16", max_sequences=256, context_tokens=2048, max_tokens=1024, enforce_eager=False
        ),
        learner=LearnerConfig(
            steps=300, lr=1e-6, warmup_steps=10, dtype="bfloat16", microbatch_tokens=8192, gradient_checkpointing=True
        ),
        eval=EvalConfig(every=25),  # solved from a reward of 1: a right answer, well formed or not
    )
