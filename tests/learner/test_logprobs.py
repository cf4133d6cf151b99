from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learner.logprobs import token_logprobs

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
@pytest.mark.parametrize("chunk_tokens", [1, 7, 50, 4096])
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


@pytest.mark.parametrize(("chunk_tokens", "bound"), [(10, 10 * VOCABULARY), (NUM_TOKENS, NUM_TOKENS * VOCABULARY)])
def test_logits_of_a_chunk_are_the_largest_tensor(inputs: tuple[Tensor, ...], chunk_tokens: int, bound: int) -> None:
    hidden, weight, targets, _ = inputs
    with LargestTensor() as largest:
        logprobs, _ = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, 1.0, chunk_tokens)
        logprobs.sum().backward()
    assert largest.num_elements == bound
