"""Linear layers by oneDNN against torch's own, in float64 and in a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import learner.onednn
from learner.onednn import linear_by_onednn, mkl_is_held_back

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")

SHAPES = [((1,), 128, 384), ((7,), 128, 17), ((2, 1, 3), 5, 1), ((16, 128), 384, 128), ((500,), 96, 1000)]
TOLERANCE = 2e-6
"""Of a product, as a share of the sum of its terms' magnitudes; a float32 has 6e-8."""


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_products_are_those_of_float32(rows: tuple[int, ...], inner: int, columns: int, bias: bool) -> None:
    layer = nn.Linear(inner, columns, bias=bias)
    assert linear_by_onednn(layer) == 1
    inputs = torch.randn(*rows, inner, requires_grad=True)
    outputs = layer(inputs)
    grads = torch.randn_like(outputs).transpose(0, -1).contiguous().transpose(0, -1)  # laid out in another order
    outputs.backward(grads)
    x, w, g = inputs.detach().flatten(0, -2), layer.weight.detach(), grads.flatten(0, -2)
    assert inputs.grad is not None and layer.weight.grad is not None
    check(outputs.flatten(0, -2), x, w.t(), layer.bias)
    check(inputs.grad.flatten(0, -2), g, w)
    check(layer.weight.grad, g.t(), x)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, g.sum(0))


def check(product: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    plus: float | Tensor = 0.0 if bias is None else bias.detach().double()
    exact = left.double() @ right.double() + plus
    terms = left.double().abs() @ right.double().abs() + abs(plus)
    assert ((product.detach().double() - exact).abs() <= TOLERANCE * terms).all()


def test_no_gradient_is_computed_that_nobody_asked_for() -> None:
    layer = nn.Linear(8, 4)
    linear_by_onednn(layer)
    layer.weight.requires_grad_(False)
    inputs = torch.randn(3, 8)
    layer(inputs).sum().backward()
    assert layer.weight.grad is None and inputs.grad is None and layer.bias.grad is not None


def test_model_has_the_gradients_of_the_plain_one(tiny_model: Path) -> None:
    plain, other = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    assert linear_by_onednn(other) > 10
    ids = torch.randint(3, 16, (4, 33))
    for model in (plain, other):
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(
    ("vendor", "capability", "held_back"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_only_where_mkl_is_held_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, capability: str, held_back: bool
) -> None:
    said: Callable[[], str] = lambda: capability  # noqa: E731
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", said)
    monkeypatch.setattr(learner.onednn, "CPU_INFO", tmp_path / "cpuinfo")
    assert not mkl_is_held_back()  # nobody knows
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert mkl_is_held_back() == held_back
