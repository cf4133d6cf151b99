import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner.logprobs import MAX_BLOCK, token_logprobs

NUM_TOKENS, HIDDEN, VOCABULARY = 50, 8, 300


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (NUM_TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(NUM_TOKENS, generator=generator)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, cap: float | None) -> Any:
    logits = hidden @ weight.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, 50, 4096])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, None), (1.3, 2.0)])
def test_values_and_gradients_equal_full_logits(
    inputs: tuple[Tensor, ...], chunk_tokens: int, temperature: float, softcap: float | None, entropy_weight: float
) -> None:
    hidden, weight, targets, grad = inputs
    results = []
    for chunked in (True, False):
        ours = [tensor.clone().double().requires_grad_() for tensor in (hidden, weight)]
        arguments = (ours[0], ours[1], targets, temperature)
        logprobs, entropy = (
            token_logprobs(*arguments, chunk_tokens, softcap) if chunked else full_logits(*arguments, softcap)
        )
        loss = (logprobs * grad).sum()
        if entropy_weight:
            loss = loss + entropy_weight * (entropy * grad.flip(0)).sum()
        loss.backward()
        results.append((logprobs.detach(), entropy.detach(), ours[0].grad, ours[1].grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_entropy_alone_has_a_gradient(inputs: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, _ = inputs
    gradients = []
    for function, more in ((token_logprobs, (7,)), (full_logits, (None,))):
        own = hidden.clone().requires_grad_()
        function(own, weight, targets, 1.0, *more)[1].sum().backward()
        gradients.append(own.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_no_tokens_give_zero_gradient(inputs: tuple[Tensor, ...]) -> None:
    _, weight, _, _ = inputs
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight.requires_grad_(), torch.zeros(0, dtype=torch.int64), 1.0, 7)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_second_backward_pass_gives_the_same_gradient(inputs: tuple[Tensor, ...]) -> None:
    """Kept logits are overwritten by the first one."""
    hidden, weight, targets, grad = inputs
    logprobs, _ = token_logprobs(hidden.requires_grad_(), weight, targets, 1.0, 40)
    first, second = (torch.autograd.grad(logprobs, hidden, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_the_gradient_of_what_is_almost_certain_is_not_lost(dtype: torch.dtype) -> None:
    """1 - p is taken in float32, before anything is rounded."""
    hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=dtype)
    token_logprobs(hidden, weight, torch.zeros(1, dtype=torch.int64), 1.0, 1)[0].sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(8 / (1 + math.exp(8)), rel=0.01)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize(("chunk_tokens", "num_kept"), [(10, 0), (24, 1), (40, 2), (4 * NUM_TOKENS, 1)])
def test_no_more_logits_than_a_chunk_has(
    inputs: tuple[Tensor, ...], chunk_tokens: int, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_BLOCK, "cpu", 64 * NUM_TOKENS if chunk_tokens < NUM_TOKENS else 1 << 21)
    hidden, weight, targets, _ = inputs
    with LargestTensor() as largest:
        logprobs, _ = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, chunk_tokens)
        node: Any = logprobs.grad_fn
        kept = [tensor.numel() for tensor in node.kept]
        logprobs.sum().backward()
    assert len(kept) == num_kept
    assert sum(kept) + max(kept, default=0) <= chunk_tokens * VOCABULARY
    assert largest.num_elements == (64 * NUM_TOKENS if chunk_tokens < NUM_TOKENS else NUM_TOKENS * VOCABULARY)
    assert not node.kept
