"""Settings of the learner."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]


class LossConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Clipped policy-gradient loss with token-level truncated importance sampling; see `learner.losses`.

    proximal: what the clipped ratio is taken against. `current`: the learner's own log-probabilities before
        the step; the truncated weight then corrects for lag and for engine mismatch. `sampled`: those of the
        sampling policy, as in PPO; the clip then bounds the distance to it and the weight is 1.
    """

    clip_low: Annotated[float, Meta(gt=0, le=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    importance_cap: PositiveFloat = 2.0
    proximal: Literal["current", "sampled"] = "current"


class LearnerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learner: `ranks` processes under torchrun, FSDP2.

    dtype: compute dtype; masters, gradients' reduction and optimizer state stay in fp32.
    lr, warmup_steps, schedule: peak rate, linear warm-up, then `constant`, `linear` or `cosine` to zero.
    microbatch_tokens: packed tokens of one forward pass; a longer single sequence gets a pass of its own.
    logprob_chunk_tokens: positions whose logits exist at one time.
    checkpoint_every: steps between checkpoints; 0: only the last. keep_checkpoints: newest ones kept.
    """

    steps: PositiveInt = 100
    lr: PositiveFloat = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    ranks: PositiveInt = 1
    microbatch_tokens: PositiveInt = 4096
    logprob_chunk_tokens: PositiveInt = 2048
    gradient_checkpointing: bool = False
    scale_rewards: bool = True
    loss: LossConfig = LossConfig()
    checkpoint_every: NonNegativeInt = 0
    keep_checkpoints: PositiveInt = 2
