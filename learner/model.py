"""The policy: any transformers causal language model under FSDP2, from token ids to log-probabilities."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.config import LoraConfig
from learner.logprobs import token_logprobs
from learner.lora import LoraLayers, add_lora
from learner.onednn import linear_by_onednn, mkl_is_held_back

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNSUPPORTED_SCALES = ("logit_scale", "logits_scaling")
"""Settings of some models that change logits outside the output embedding."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """temperature: of the sampling policy, at which log-probabilities are taken. The rest as in `LearnerConfig`."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    temperature: float = 1.0
    logprob_chunk_tokens: int = 2048
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    compile: bool = False
    offload: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


class PolicyModel(nn.Module):
    """A causal language model whose forward pass ends in log-probabilities of given targets.

    The output head runs inside `forward`, because only there are FSDP's root parameters whole.
    """

    def __init__(self, causal_lm: PreTrainedModel, temperature: float, logprob_chunk_tokens: int) -> None:
        """Raises: ValueError if the model's logits are not hidden · weightᵀ, up to a soft cap."""
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.device = torch.device("cpu")
        self.lora: LoraLayers | None = None
        self.softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        _check_head(causal_lm)

    @property
    def attention_tokens(self) -> float:
        """Length of a sequence at which attention costs as much as the matrices: its scores and values take 4 · n · H
        operations a token and layer, matrices 24 · H² with a feed-forward part four times as wide as the model."""
        return 6.0 * self.causal_lm.config.get_text_config().hidden_size

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, loss_positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and the entropy there.

        Args: input_ids, position_ids: int64 [R, L]; packed sequences are told apart by positions that restart.
            loss_positions: int64 [K], indices into the flattened [R · L]. targets: int64 [K].
        Returns: (logprobs [K] with gradient, entropy [K] without), float32, nats.
        """
        if self.causal_lm.config._attn_implementation == "flash_attention_2":
            # transformers looks for packed sequences in a single row only; each of our rows begins with position 0.
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        # attention_mask stays None: only then does transformers find the packed sequences in position_ids.
        output = self.causal_lm.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, loss_positions)
        return token_logprobs(
            hidden, _head_weight(self.causal_lm), targets, self.temperature, self.logprob_chunk_tokens, self.softcap
        )


def build_model(model_path: str | Path, options: ModelOptions) -> PolicyModel:
    """Load a model with fp32 masters and shard it over all ranks of the process group, which must exist.

    Raises: ValueError, in one line, if transformers cannot load a causal language model from there, or it has no such
        layers as are to be adapted.
    """
    causal_lm = load_causal_lm(model_path, options.attention)
    policy = PolicyModel(causal_lm, options.temperature, options.logprob_chunk_tokens)
    if options.lora.is_on:
        policy.lora = add_lora(causal_lm, decoder_layers(causal_lm), options.lora, DTYPES[options.dtype])
    if options.compile:
        _compile(causal_lm)
    elif options.device == "cpu" and options.dtype == "float32" and mkl_is_held_back():
        linear_by_onednn(causal_lm)
    if options.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _disable_dropout(policy)
    policy.train()  # transformers checkpoints gradients in training mode only
    return shard(policy, options)


def load_causal_lm(model_path: str | Path, attention: str = "sdpa") -> PreTrainedModel:
    try:
        return heed_softcap(
            AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation=attention)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {str(model_path)!r} cannot be loaded as a causal language model: {first_line}"
        ) from None


def heed_softcap(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """transformers' SDPA (5.19) leaves out the soft cap of attention scores, Gemma 2's, without a word."""
    softcap = getattr(causal_lm.config, "attn_logit_softcapping", None)
    if softcap and causal_lm.config._attn_implementation == "sdpa":
        causal_lm.set_attn_implementation("eager")
    return causal_lm


def shard(policy: PolicyModel, options: ModelOptions) -> PolicyModel:
    """FSDP2 over every decoder layer and the root. Gradients are summed over ranks, not averaged."""
    mesh = init_device_mesh(options.device, (torch.distributed.get_world_size(),), mesh_dim_names=("data",))
    precision = MixedPrecisionPolicy(param_dtype=DTYPES[options.dtype], reduce_dtype=torch.float32)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    if options.offload:
        settings["offload_policy"] = CPUOffloadPolicy()
    policy.device = torch.device(options.device)
    for layer in decoder_layers(policy.causal_lm):
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global number of tokens: a mean over ranks would divide it once more.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    return policy


def reshard(policy: PolicyModel) -> None:
    """After a forward pass without a backward pass: FSDP reshards the root only in the latter, so that the root's
    whole parameters would live on, and the next pass would use them instead of what the optimizer has made."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def _compile(causal_lm: PreTrainedModel) -> None:
    """What a layer computes, not its call: FSDP's hooks and gradient checkpointing stay outside the graph."""
    for layer in decoder_layers(causal_lm):
        layer.forward = torch.compile(layer.forward, dynamic=True)  # rows of every micro-batch have other widths


def hidden_matrices(policy: PolicyModel) -> list[nn.Parameter]:
    """The matrices of decoder layers: no embedding, head, norm or bias, and no experts kept in one tensor of three
    dimensions."""
    layers = decoder_layers(policy.causal_lm)
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.ndim == 2]


def num_trainable(policy: PolicyModel) -> int:
    """Parameters that are trained, over all ranks; shared ones once."""
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    names = set(causal_lm._no_split_modules or ())
    # fully_shard gives a layer a class of its own, derived from the layer's.
    return [module for module in causal_lm.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def _head_weight(causal_lm: PreTrainedModel) -> Tensor:
    head: Any = causal_lm.get_output_embeddings()  # looked up each time: FSDP exchanges the parameter
    return head.weight


def _check_head(causal_lm: PreTrainedModel) -> None:
    head = causal_lm.get_output_embeddings()
    scales = [name for name in UNSUPPORTED_SCALES if getattr(causal_lm.config, name, 1.0) not in (None, 1.0)]
    if head is None or getattr(head, "bias", None) is not None or scales:
        reason = f"its config sets {scales[0]}" if scales else "its output head is not a plain matrix"
        raise ValueError(f"{type(causal_lm).__name__} cannot be trained: {reason}")


def _disable_dropout(policy: PolicyModel) -> None:
    """Training mode must not change log-probabilities: they are compared with those of the sampling engine."""
    for module in policy.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "dropout" in name):
                setattr(module, name, 0.0)
