"""Settings of the learner."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
OffTurn = Literal["none", "optimizer", "all"]


class AdvantageConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From rewards to advantages; see `learner.advantages` and docs/guide/losses.md.

    estimator: `grpo`, `dr_grpo`, `rloo`, `reinforce++`, `reinforce++_baseline`, `lite_ppo`, `gdpo`, `none`, or
        `PATH.py:FUNCTION`: a function of one `databus.groups.Group` that returns [G] or, a token each, [T] advantages.
    mask_truncated: completions that ended for want of room bear no loss; their rewards still count in baselines.
    overlong_tokens, overlong_cache_tokens: completions lose up to 1 of reward over the last `overlong_cache_tokens`
        before `overlong_tokens` (DAPO's overlong shaping); 0: none do.
    """

    estimator: str = "grpo"
    mask_truncated: bool = False
    overlong_tokens: NonNegativeInt = 0
    overlong_cache_tokens: NonNegativeInt = 0


class LossConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy loss; see `learner.losses`, `learner.corrections`, and docs/guide/losses.md.

    kind: the surrogate. clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: bound of `ppo`'s ratio where A < 0; above 1 + clip_high, or 0 for none.
    proximal: what the ratio is taken against. `current`: the learner's own log-probabilities of the moment, so that the
        ratio is 1 and the correction alone counts; `recomputed`: the learner's when the batch began, which is the same
        with one minibatch; `sampled`: the sampling policy's, as in PPO, which leaves nothing to correct.
    correction: weight of a token for proximal against sampled probability; `importance_low`, `importance_cap` bound it.
    aggregation: `token`: mean over the batch's loss-bearing tokens; `sequence`: mean over completions of their means;
        `fixed`: sum over `fixed_tokens` a completion.
    kl_coef: weight of the divergence from the initial model, added to the loss or, `kl_in=reward`, taken off rewards.
    entropy_coef: weight of the entropy bonus.
    """

    kind: Literal["ppo", "gspo", "cispo", "aipo", "reinforce"] = "ppo"
    clip_low: Annotated[float, Meta(gt=0, le=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    dual_clip: NonNegativeFloat = 0.0
    proximal: Literal["current", "recomputed", "sampled"] = "current"
    correction: Literal["none", "token_tis", "sequence_tis", "token_mask", "sequence_mask", "geometric_mask"] = (
        "token_tis"
    )
    importance_low: NonNegativeFloat = 0.0
    importance_cap: PositiveFloat = 2.0
    aggregation: Literal["token", "sequence", "fixed"] = "token"
    fixed_tokens: NonNegativeInt = 0
    kl_coef: NonNegativeFloat = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: NonNegativeFloat = 0.0

    @property
    def regularised(self) -> bool:
        """Does the loss have a gradient where the advantage is 0?"""
        return self.entropy_coef > 0 or (self.kl_coef > 0 and self.kl_in == "loss")


class LoraConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (LoRA) in place of all parameters; see `learner.lora` and docs/guide/lora.md.

    rank: of an adapter's two factors; 0: no adapters. alpha: an adapter adds alpha / rank · B · A to its matrix.
    target_modules: linear layers that get one, by the last part of their names, such as `q_proj`; `all-linear`: those
        of all decoder layers.
    """

    rank: Annotated[int, Meta(ge=0, le=1024)] = 0
    alpha: PositiveFloat = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)

    @property
    def is_on(self) -> bool:
        return self.rank > 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __str__(self) -> str:
        if not self.is_on:
            return "no adapters (learner.lora.rank=0)"
        targets = ",".join(self.target_modules)
        return f"learner.lora.rank={self.rank} alpha={self.alpha:g} target_modules={targets}"


class ApolloConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """APOLLO's projection of gradients (arXiv:2412.05270).

    rank: of the projection; a quarter of the model's width in the paper. update_every: steps after which another one
    is drawn. scale_by, scale: the gradient is scaled as its projection is by Adam, each `channel` or the whole
    `tensor`, times the root of `scale`; APOLLO-Mini is rank 1 by tensor, with a scale of 128.
    """

    rank: PositiveInt = 256
    update_every: PositiveInt = 200
    scale_by: Literal["channel", "tensor"] = "channel"
    scale: PositiveFloat = 1.0


class LearnerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The learner: `ranks` processes, FSDP2, evenly on `nodes` machines; several take `echelon run --on`.

    dtype: compute dtype; masters, gradients' reduction and optimizer state stay in fp32.
    lr, warmup_steps, schedule: peak rate, linear warm-up, then `constant`, `linear` or `cosine` to zero.
    minibatches: parts of a batch, each with an optimizer update of its own; a policy version is a whole batch.
    microbatch_tokens: packed tokens of one forward pass; a longer single sequence gets a pass of its own.
    logprob_chunk_tokens: positions whose logits exist at one time; those that are not in work are kept for the
        backward pass, which computes the rest again.
    attention: kernel, as transformers names it; all but `sdpa` need `cuda`, `flash_attention_2` also bfloat16 and the
        package flash-attn.
    compile: decoder layers through torch.compile; some minutes at the start, and a C++ compiler.
    offload: masters, gradients and optimizer state in host memory; the optimizer steps there. Needs `cuda`.
    off_turn: what moves to host memory while engines have the device, with `placement=colocated` on `cuda`: optimizer
        state, `all` (masters and the reference model, too), or `none`, where device memory has room for both sides.
    optimizer: `adamw`; `muon` or `apollo` for the matrices of decoder layers and AdamW for the rest, with one rate.
    apollo: what APOLLO keeps of gradients.
    lora: adapters that are trained in place of the model's own parameters.
    checkpoint_every: steps between checkpoints; 0: only the last. keep_checkpoints: newest ones kept.
    keep_best: older ones kept beside them, by their accuracy in evaluations.
    async_checkpoints: training waits for a copy in host memory only, which is written while it goes on.
    memory_copy_every: steps between copies of the state in shared memory, from which a learner that was killed goes on;
        0: none. It takes up to three times the state's size of the machine's memory.
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
    nodes: PositiveInt = 1
    minibatches: PositiveInt = 1
    microbatch_tokens: PositiveInt = 4096
    logprob_chunk_tokens: PositiveInt = 2048
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    compile: bool = False
    offload: bool = False
    off_turn: OffTurn = "all"
    optimizer: Literal["adamw", "muon", "apollo"] = "adamw"
    apollo: ApolloConfig = ApolloConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    checkpoint_every: NonNegativeInt = 0
    keep_checkpoints: PositiveInt = 2
    keep_best: NonNegativeInt = 0
    async_checkpoints: bool = True
    memory_copy_every: NonNegativeInt = 0
