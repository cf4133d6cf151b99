"""DAPO on DAPO-Math-17k with Qwen2.5-7B: clip-higher, dynamic sampling, token-level loss, overlong shaping.

    echelon run recipes/dapo_math.py rollout.device=cuda learner.device=cuda learner.ranks=4

Not yet run at this size: tested for two steps with a tiny model on a file in the data set's schema. Needs 8 GPUs of
80 GB. The data set's `prompt` is a chat and its `reward_model` holds the answer: both are taken as they are.
Settings: arXiv:2503.14476, section 4; their answers run to 20,480 tokens.
"""

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import AdvantageConfig, LearnerConfig, LossConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig, SchedulingConfig


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen2.5-7B",
        data=DataConfig(train="BytedTsinghua-SIA/DAPO-Math-17k", prompt="{prompt[0][content]}", chat=True),
        reward=RewardConfig(function="math", processes=4),
        max_staleness=2,
        group_size=16,
        batch_groups=512,
        rollout=RolloutConfig(
            dtype="bfloat16", max_sequences=512, context_tokens=22528, max_tokens=20480, enforce_eager=False
        ),
        scheduling=SchedulingConfig(drop_zero_variance=True),
        learner=LearnerConfig(
            steps=300,
            lr=1e-6,
            warmup_steps=20,
            dtype="bfloat16",
            minibatches=16,
            microbatch_tokens=24576,
            gradient_checkpointing=True,
            checkpoint_every=50,
            advantage=AdvantageConfig(overlong_tokens=20480, overlong_cache_tokens=4096),
            loss=LossConfig(proximal="recomputed", clip_low=0.2, clip_high=0.28, aggregation="token"),
        ),
        eval=EvalConfig(every=0),
    )
