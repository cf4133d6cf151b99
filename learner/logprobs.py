"""Log-probabilities of tokens from hidden states, in chunks: [T, V] logits never exist at once."""

from typing import Any

import torch
from torch import Tensor


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden · weightᵀ / temperature), and the entropy.

    Neither the forward nor the backward pass holds logits of more than `chunk_tokens` positions: the backward
    recomputes them. The matrix product is in the dtype of `hidden`; the softmax is in float32.

    Args: hidden: [T, H]. weight: [V, H], the output embedding. targets: int64 [T]. temperature: above 0.
        chunk_tokens: at least 1. softcap: where given, logits become softcap · tanh(logits / softcap) first (Gemma).
    Returns: (logprobs, entropy), float32 [T], nats, both with gradient to hidden and weight. That of the entropy costs
        nothing where it is not used.
    """
    logprobs, entropy = _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk_tokens, softcap)
    return logprobs, entropy


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            scaled, _ = _scaled_logits(hidden[part], weight, temperature, softcap)
            log_softmax = scaled.log_softmax(dim=-1)
            logprobs[part] = log_softmax.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = -(log_softmax.exp() * log_softmax).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = (temperature, chunk_tokens, softcap)
        ctx.set_materialize_grads(False)  # an entropy that no loss uses has no gradient, and costs none
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        temperature, chunk_tokens, softcap = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            of_logprobs, of_entropy = (None if grad is None else grad[part] / temperature for grad in grads)
            scaled, slope = _scaled_logits(hidden[part], weight, temperature, softcap)
            grad_logits = _grad_scaled(scaled, targets[part], of_logprobs, of_entropy)
            if slope is not None:
                grad_logits *= slope
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += (grad_logits.t() @ hidden[part]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits over temperature, float32 [chunk, V]; and d(capped)/d(raw), None without a cap."""
    logits = (hidden @ weight.t()).float()
    if softcap is None:
        return logits / temperature, None
    capped = (logits / softcap).tanh()
    return capped * (softcap / temperature), 1 - capped.square()


def _grad_scaled(scaled: Tensor, targets: Tensor, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    """Gradient with respect to the scaled logits, [chunk, V], from that of log-probabilities and of entropy, [chunk].

    d logprob / d z = onehot(target) - p, and d entropy / d z = -p · (log p + entropy).
    """
    log_softmax = scaled.log_softmax(dim=-1) if of_entropy is not None else None
    softmax = scaled.softmax(dim=-1) if log_softmax is None else log_softmax.exp()
    grad = torch.zeros_like(softmax[:, :1]) if of_logprobs is None else -of_logprobs[:, None]
    if log_softmax is not None and of_entropy is not None:
        entropy = -(softmax * log_softmax).sum(dim=-1, keepdim=True)
        grad = grad - of_entropy[:, None] * (log_softmax + entropy)
    grad_logits = softmax.mul_(grad)
    if of_logprobs is not None:
        grad_logits.scatter_add_(1, targets[:, None], of_logprobs[:, None])
    return grad_logits
