"""Linear layers in float32 on AMD's processors, multiplied by oneDNN where torch would take MKL.

MKL uses AVX-512 on Intel's processors only: on AMD's oneDNN multiplies twice as fast, and the step of a small model is
half multiplications (docs/decisions/036-linear-layers-by-onednn.md).
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

CPU_INFO = Path("/proc/cpuinfo")
HELD_BACK = "AuthenticAMD"


def mkl_is_held_back() -> bool:
    """Does MKL use less of this processor than there is? Not a matter of timing: a replay is to compute the same."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with suppress(OSError):
        return HELD_BACK in CPU_INFO.read_text()
    return False


def linear_by_onednn(model: nn.Module) -> int:
    """Have all linear layers of a model multiply by oneDNN, forward and backward, in float32; how many they are."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return _Product.apply(inputs, layer.weight, layer.bias)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """`nn.functional.linear` of inputs [..., I], weight [O, I] and bias [O] or None."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if needs_inputs else None,
            _product(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [..., I] · rightᵀ [I, O] + bias: the operator that torch's own compiler puts in place of linear layers."""
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    return operator(left, right, bias, "none", [], "")
