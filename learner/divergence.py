"""Estimates of KL(p ‖ q) from tokens drawn from p. Source: Schulman 2020, "Approximating KL divergence"."""

from typing import Literal

from torch import Tensor


def divergence(log_ratio: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """The estimate at each token, nats; [K] like log_ratio = log q - log p.

    k1 = -log r; k2 = (log r)² / 2; k3 = r - 1 - log r. k1 and k3 have the right mean, k3 is never negative. As a
    term of the loss only k2 has the right gradient in the mean: that of k1 is 0, that of k3 is biased
    (Tang and Munos, arXiv:2506.09477). TRL: `beta` times k3, in the loss.
    """
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return k3_divergence(log_ratio)


def k3_divergence(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() - log_ratio
