"""GSPO on DAPO-Math-17k with Qwen3-30B-A3B: a mixture of experts, whose ratio is taken over whole sequences.

    echelon run recipes/gspo_moe.py rollout.device=cuda learner.device=cuda learner.offload=true

Which experts a token takes changes with the weights, so that ratios of single tokens are mostly noise; GSPO clips their
geometric mean over the sequence. Not yet run at this size: tested for two steps with a tiny mixture of four experts.
Needs, by arithmetic, 8 GPUs of 80 GB (6 for the learner, one for each of two engines) and 490 GB of host memory for
masters, gradients and Adam. Clip range and four minibatches a batch: arXiv:2507.18071.
"""

from echelon.config import DataConfig, RunConfig
from learner.config import LearnerConfig, LossConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen3-30B-A3B",
        data=DataConfig(train="BytedTsinghua-SIA/DAPO-Math-17k", prompt="{prompt[0][content]}", chat=True),
        reward=RewardConfig(function="math", processes=4),
        max_staleness=1,
        group_size=16,
        batch_groups=128,
        rollout=RolloutConfig(
            workers=2,
            dtype="bfloat16",
            max_sequences=256,
            context_tokens=10240,
            max_tokens=8192,
            gpu_memory_fraction=0.9,
            enforce_eager=False,
        ),
        learner=LearnerConfig(
            steps=200,
            lr=1e-6,
            warmup_steps=10,
            dtype="bfloat16",
            ranks=6,
            minibatches=4,
            microbatch_tokens=10240,
            gradient_checkpointing=True,
            checkpoint_every=50,
            loss=LossConfig(
                kind="gspo",
                proximal="recomputed",  # not what engines said: another kernel, another expert
                clip_low=3e-4,
                clip_high=4e-4,
                aggregation="sequence",
            ),
        ),
    )
