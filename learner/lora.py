"""Training low-rank adapters (LoRA) in place of a model's own parameters, through peft.

Source: Hu et al., LoRA (arXiv:2106.09685).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from databus.messages import AdaptedWeight, Adapter
from learner.config import LoraConfig
from learner.snapshot import as_stored

ALL_LINEAR = "all-linear"
SETTING = "learner.lora.target_modules"
ADAPTER_NAME = "default"
"""By which peft tells adapters of one layer apart; there is one."""


@dataclass(frozen=True, kw_only=True)
class LoraLayers:
    """layers: peft's, by the name under which the weight that they adapt is stored. adapter: for those who merge."""

    layers: dict[str, Any]
    adapter: Adapter

    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, in the order and under the names of a version's manifest; sharded where the model is."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A", layer.lora_A[ADAPTER_NAME].weight
            yield f"{name}.lora_B", layer.lora_B[ADAPTER_NAME].weight


def add_lora(
    causal_lm: PreTrainedModel, decoder_layers: Iterable[nn.Module], config: LoraConfig, dtype: torch.dtype
) -> LoraLayers:
    """Freeze the model, in `dtype`, and put fp32 adapters beside its matrices. At first they add nothing.

    There is no dropout: what is trained on is compared with what the engine samples from.
    Args: causal_lm: as loaded, in fp32. dtype: what it computes in; nothing else is asked of frozen parameters.
    Raises: ValueError, in one line, as `target_names`.
    """
    from peft import inject_adapter_in_model

    names = target_names(causal_lm, decoder_layers, config.target_modules)
    weights = {name: _adapted(causal_lm, name) for name in names}
    inject_adapter_in_model(peft_config(config, names), causal_lm, ADAPTER_NAME)
    for parameter in causal_lm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    layers = {weights[name].name: causal_lm.get_submodule(name) for name in names}
    return LoraLayers(layers=layers, adapter=Adapter(scale=config.scale, weights=tuple(weights.values())))


def peft_config(config: LoraConfig, names: Iterable[str]) -> Any:
    """peft's settings. Args: names: of the linear layers, whole."""
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides it
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def target_names(causal_lm: nn.Module, decoder_layers: Iterable[nn.Module], target_modules: Iterable[str]) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    Args: causal_lm: may lie on the meta device. target_modules: as `LoraConfig.target_modules`.
    Raises: ValueError, in one line, for a name that no layer has, or one that is not a plain linear layer of decoder
        layers: an output head, experts that are kept in one tensor, a router.
    """
    inside = {id(module) for layer in decoder_layers for module in layer.modules()}
    parts: dict[str, list[str]] = {}
    linear: dict[str, list[str]] = {}
    for name, module in causal_lm.named_modules():
        part = name.rpartition(".")[2]
        parts.setdefault(part, []).append(name)
        if type(module) is nn.Linear and id(module) in inside:
            linear.setdefault(part, []).append(name)
    chosen = set(target_modules)
    for part in sorted(chosen - {ALL_LINEAR}):
        if part not in linear or linear[part] != parts[part]:
            what = "not a plain linear layer of the decoder" if part in parts else "of no layer's name"
            allowed = ", ".join([ALL_LINEAR, *linear])
            raise ValueError(f"{SETTING} has {part!r}, which is {what} in this model: allowed are {allowed}")
    return [name for part, names in linear.items() if part in chosen or ALL_LINEAR in chosen for name in names]


@contextmanager
def adapters_off(lora: LoraLayers | None) -> Iterator[None]:
    """Inside, the model is the one that training began with; so it is where there are no adapters."""
    layers = [] if lora is None else list(lora.layers.values())
    for layer in layers:
        layer.set_scale(ADAPTER_NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER_NAME, 1.0)


def _adapted(causal_lm: PreTrainedModel, name: str) -> AdaptedWeight:
    weight = causal_lm.get_parameter(f"{name}.weight").detach()
    stored = as_stored(causal_lm, f"{name}.weight", weight)
    if [tensor.shape for tensor in stored.values()] != [weight.shape]:
        raise ValueError(f"{SETTING}: {name} is stored as {', '.join(stored)}, to which no adapter can be added")
    return AdaptedWeight(name=next(iter(stored)), base_xxh3=xxhash.xxh3_64_intdigest(weight.contiguous().numpy().data))
