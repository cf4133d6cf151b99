"""GRPO with adapters (LoRA): chain sums, or a model and data of your own. The model's own weights stay as they are.

    python recipes/prepare_chain_sum.py --out .cache/chain_sum
    echelon run recipes/grpo_lora.py
    echelon run recipes/grpo_lora.py model=Qwen/Qwen2.5-0.5B-Instruct data.train=openai/gsm8k data.subset=main \\
        "data.prompt={question}" data.chat=true reward.function=math eval.every=0 learner.lr=1e-5 \\
        rollout.context_tokens=1536 rollout.max_tokens=1024 rollout.device=cuda learner.device=cuda

Versions are the adapters alone: workers merge them with the model that they started from, and vLLM serves the result.
`echelon export` writes the merged model, and the adapter beside it as peft has it. With a rate ten times that of all
parameters, as adapters want (docs/guide/lora.md). Tested for two steps; what 100 steps gain was not measured.
"""

from pathlib import Path

from echelon.config import DataConfig, EvalConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig, LoraConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig

TASK = Path(".cache/chain_sum")


def recipe() -> RunConfig:
    return RunConfig(
        model=str(TASK / "model"),
        data=DataConfig(train=str(TASK / "train.jsonl"), eval=str(TASK / "eval.jsonl")),
        reward=RewardConfig(function="grpo_chain_sum.py:chain_sum_reward"),
        max_staleness=2,
        group_size=16,
        batch_groups=16,
        rollout=RolloutConfig(max_sequences=256, context_tokens=256, max_tokens=128),
        learner=LearnerConfig(
            steps=100,
            lr=1e-3,
            warmup_steps=5,
            schedule="linear",
            microbatch_tokens=2048,
            lora=LoraConfig(rank=16, alpha=32.0),
        ),
        eval=EvalConfig(every=10),
        wandb=WandbConfig(mode="disabled"),
    )
