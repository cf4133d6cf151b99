"""The mismatch gate: does an engine that has loaded a version say of fixed texts what the learner says of them?"""

from collections.abc import Sequence

import numpy as np

from databus.codec import Array
from databus.messages import Mismatch, Probe
from rollout.config import GateConfig
from rollout.engine.base import GateRefused

WORST = 1e9
"""Stands for what is not finite: such a version is refused, whatever is allowed."""


def admit(version: int, probe: Probe, scored: Sequence[Array], config: GateConfig) -> Mismatch:
    """Compare, and let the version pass.

    Args: scored: float32 [t - 1] for each sequence of t tokens, the engine's log-probabilities, as of `Probe`.
    Raises: GateRefused; ValueError where learner and engine have not scored the same tokens.
    """
    mismatch = mismatch_of(probe, scored)
    if mismatch.kl <= config.max_kl and mismatch.difference <= config.max_difference:
        return mismatch
    raise GateRefused(version, mismatch, config)


def mismatch_of(probe: Probe, scored: Sequence[Array]) -> Mismatch:
    """The estimator is that of `mismatch/kl`: k3 = r - 1 - log r, r = p_learner / p_engine (Schulman 2020)."""
    lengths = [len(ids) - 1 for ids in probe.sequences]
    if not sum(lengths) or [len(given) for given in probe.logprobs] != lengths or list(map(len, scored)) != lengths:
        raise ValueError("the probe and its log-probabilities differ in length")
    log_ratio = np.concatenate(probe.logprobs).astype(np.float64) - np.concatenate(scored)
    with np.errstate(over="ignore", invalid="ignore"):
        kl, difference = float(np.mean(np.expm1(log_ratio) - log_ratio)), float(np.abs(log_ratio).max())
    return Mismatch(kl=_finite(kl), difference=_finite(difference))


def _finite(value: float) -> float:
    return float(np.nan_to_num(min(value, WORST), nan=WORST))
