"""The log-probability head beside full logits: seconds and peak memory of a forward and a backward pass."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from learner.logprobs import token_logprobs

CHUNK_TOKENS = 384
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cost:
    """seconds: of both passes. peak_bytes: resident memory beyond the inputs, gradients of them included."""

    seconds: float
    peak_bytes: int


def blocked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden, weight, targets, 1.0, CHUNK_TOKENS)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same figures from [T, V] logits, in as few operations and as little memory as plain torch takes."""
    log_softmax = (hidden @ weight.t()).log_softmax(-1)
    with torch.no_grad():
        # In parts, as TRL does it: at once it would take two more [T, V].
        entropy = torch.cat([-(part.exp() * part).sum(-1) for part in log_softmax.split(128)])
    return -F.nll_loss(log_softmax, targets, reduction="none"), entropy


HEADS: dict[str, Head] = {"ours": blocked, "full logits": full_logits}


def inputs(tokens: int, hidden: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(tokens, hidden).requires_grad_(),
        (0.05 * torch.randn(vocabulary, hidden)).requires_grad_(),
        torch.randint(0, vocabulary, (tokens,)),
    )


def measure(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> Cost:
    hidden.grad = weight.grad = None
    gc.collect()
    before = _reset_peak()
    start = time.perf_counter()
    logprobs, _ = head(hidden, weight, targets)
    logprobs.sum().backward()
    seconds = time.perf_counter() - start
    return Cost(seconds, _status_bytes("VmHWM") - before)


def _reset_peak() -> int:
    """Forget the peak of this process's resident memory; what it is now, in bytes. Linux alone can do that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
