"""Log-probabilities of tokens from hidden states, block by block: [T, V] logits never exist at once.

Blocks are ranges of the vocabulary, not of tokens: a block's rows of the weight are read once for all tokens, their
gradient is written once, and a running softmax needs only vectors of length T between blocks.
"""

from typing import Any

import torch
from torch import Tensor

MIN_BLOCK_WIDTH = 64
"""Narrower blocks leave a matrix product too little to do."""
MAX_BLOCK = {"cpu": 1 << 21}
"""Logits of a block, by device: 8 MiB of them stay in a processor's last-level cache from one operation to the next."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden · weightᵀ / temperature), and the entropy.

    At no time are there more logits than `chunk_tokens` positions have, or `MIN_BLOCK_WIDTH` a position: as many as
    that allows are kept for the backward pass, which computes the others again. The matrix product is in the dtype
    of `hidden`; the softmax is in float32.

    Args: hidden: [T, H]. weight: [V, H], the output embedding. targets: int64 [T]. temperature: above 0.
        chunk_tokens: at least 1. softcap: where given, logits become softcap · tanh(logits / softcap) first (Gemma).
    Returns: (logprobs, entropy), float32 [T], nats, both with gradient to hidden and weight. That of the entropy costs
        nothing where it is not used.
    Source: the running softmax over blocks is that of Milakov and Gimelshein (arXiv:1805.02867).
    """
    logprobs, entropy = _BlockedLogprobs.apply(hidden, weight, targets, temperature, chunk_tokens, softcap)
    return logprobs, entropy


class _BlockedLogprobs(torch.autograd.Function):
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
        softmax = _RunningSoftmax(hidden.shape[0], hidden.device)
        chosen = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        blocks, num_kept = _blocks(hidden, weight, chunk_tokens)
        kept: list[Tensor] = []
        for block in blocks:
            scaled = _scaled_logits(hidden, weight[block], temperature, softcap)
            inside, columns = _targets_inside(targets, block)
            chosen = torch.where(inside, scaled.gather(1, columns).squeeze(1), chosen)
            softmax.add(scaled)
            if len(kept) < num_kept:
                kept.append(scaled)
        normalizer, entropy = softmax.result()
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.settings = (temperature, softcap)
        ctx.blocks, ctx.kept = blocks, kept
        ctx.set_materialize_grads(False)  # an entropy that no loss uses has no gradient, and costs none
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        temperature, softcap = ctx.settings
        of_logprobs, of_entropy = (None if grad is None else grad[:, None] / temperature for grad in grads)
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # frozen beside adapters
        kept, ctx.kept = ctx.kept[::-1], []  # overwritten below: a second pass has to compute them again
        for block in ctx.blocks:
            scaled = kept.pop() if kept else _scaled_logits(hidden, weight[block], temperature, softcap)
            slope = None if softcap is None else 1 - (scaled * (temperature / softcap)).square_()
            grad_logits = _grad_scaled(scaled.sub_(normalizer[:, None]), entropy[:, None], of_logprobs, of_entropy)
            if of_logprobs is not None:
                inside, columns = _targets_inside(targets, block)
                grad_logits.scatter_add_(1, columns, torch.where(inside[:, None], of_logprobs, 0.0))
            if slope is not None:
                grad_logits *= slope
            grad_logits = grad_logits.to(hidden.dtype)
            _add_product(grad_hidden, grad_logits, weight[block])
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


class _RunningSoftmax:
    """Normaliser and mean of logits of which a block [T, width] is seen at a time; all in float32."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self._largest = torch.full((num_tokens,), -torch.inf, device=device)
        self._total = torch.zeros(num_tokens, device=device)
        self._weighted = torch.zeros(num_tokens, device=device)

    def add(self, scaled: Tensor) -> None:
        largest = torch.maximum(self._largest, scaled.amax(dim=-1))
        shrink = (self._largest - largest).exp_()
        share = (scaled - largest[:, None]).exp_()
        self._total = self._total * shrink + share.sum(dim=-1)
        self._weighted = self._weighted * shrink + share.mul_(scaled).sum(dim=-1)
        self._largest = largest

    def result(self) -> tuple[Tensor, Tensor]:
        """(log of the sum of exponentials [T], entropy [T])."""
        normalizer = self._total.log() + self._largest
        return normalizer, normalizer - self._weighted / self._total


def _blocks(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[list[slice], int]:
    """Ranges of the vocabulary, all but the last equally wide; and how many blocks of logits, beside the one in work,
    are as many as `chunk_tokens` positions have."""
    num_tokens, vocabulary = max(1, hidden.shape[0]), weight.shape[0]
    allowed = chunk_tokens * vocabulary
    block = min(allowed // 2, MAX_BLOCK.get(hidden.device.type, allowed))
    width = max(MIN_BLOCK_WIDTH, block // num_tokens)
    blocks = [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
    return blocks, max(0, allowed // (width * num_tokens) - 1)


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Logits over temperature, float32 [T, width]."""
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


def _targets_inside(targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the block, bool [T], and their columns in it, [T, 1]; 0 for the rest."""
    inside = (targets >= block.start) & (targets < block.stop)
    return inside, torch.where(inside, targets - block.start, 0)[:, None]


def _grad_scaled(log_softmax: Tensor, entropy: Tensor, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    """Gradient with respect to the scaled logits, [T, width], without what the target alone adds.

    d logprob / d z = onehot(target) - p, and d entropy / d z = -p · (log p + entropy).
    Args: log_softmax: [T, width], which is overwritten. The rest [T, 1].
    """
    if of_entropy is None:
        assert of_logprobs is not None
        return log_softmax.exp_().mul_(-of_logprobs)
    softmax = log_softmax.exp()
    grad = log_softmax.add_(entropy).mul_(-of_entropy)
    return softmax.mul_(grad if of_logprobs is None else grad.sub_(of_logprobs))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left · right to the total, which is float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
