"""GRPO on MBPP with Qwen2.5-Coder-1.5B-Instruct: programs that pass a problem's tests, in the sandbox.

    echelon run recipes/grpo_code.py rollout.device=cuda learner.device=cuda

Not yet run at this size: tested for two steps with a tiny model on a file in MBPP's schema. Needs one or two NVIDIA
GPUs, the hub, and a kernel that lets users make namespaces (docs/guide/sandbox.md). Other data: `input_output` of APPS
and TACO, or `tests`.
"""

from echelon.config import DataConfig, EvalConfig, RunConfig
from learner.config import LearnerConfig
from rewards.config import CodeConfig, RewardConfig
from rollout.config import RolloutConfig


def recipe() -> RunConfig:
    return RunConfig(
        model="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        data=DataConfig(
            train="google-research-datasets/mbpp",
            eval="google-research-datasets/mbpp",
            prompt="{text}\nAnswer with one Python code block. It has to pass:\n{test_list[0]}",
            chat=True,
            max_eval=256,
        ),
        reward=RewardConfig(function="code", processes=4, code=CodeConfig(test_s=4.0, total_s=8.0)),
        max_staleness=2,
        group_size=8,
        batch_groups=32,
        rollout=RolloutConfig(
            dtype="bfloat16", max_sequences=256, context_tokens=2048, max_tokens=1024, enforce_eager=False
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
