import math

import numpy as np
import pytest

from databus.messages import Mismatch, Probe
from rollout.config import GateConfig
from rollout.engine.base import GateRefused
from rollout.engine.gate import WORST, admit, mismatch_of

GATE = GateConfig(max_kl=0.1, max_difference=1.0)


def probe(*logprobs: float) -> Probe:
    return Probe(sequences=(tuple(range(len(logprobs) + 1)),), logprobs=(logprobs,))


def scored(*logprobs: float) -> list[np.ndarray]:
    return [np.array(logprobs, np.float32)]


def test_mismatch_by_hand() -> None:
    """k3 = r - 1 - log r: log r = -1 gives 1/e, log r = 0.5 gives e^0.5 - 1.5, log r = 0 gives 0."""
    mismatch = mismatch_of(probe(-2.0, -0.5, -4.0), scored(-1.0, -1.0, -4.0))
    assert mismatch.kl == pytest.approx((math.exp(-1) + math.exp(0.5) - 1.5) / 3)
    assert mismatch.difference == 1.0


def test_both_bounds_hold() -> None:
    assert admit(3, probe(-1.0, -2.0), scored(-1.0, -2.25), GATE).difference == 0.25
    with pytest.raises(GateRefused, match=r"version 3 refused: .* KL 0\.18 nats a token \(rollout.gate.max_kl=0.1\)"):
        admit(3, probe(-1.0, -2.0), scored(-1.0, -3.0 + 0.25), GATE)
    with pytest.raises(GateRefused, match=r"at most 1\.2 \(rollout.gate.max_difference=1\)"):
        admit(3, probe(*[-1.0] * 99), scored(*[-1.0] * 98, -2.25 + 2.5), GATE)


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e30])
def test_what_is_not_finite_is_refused_whatever_is_allowed(value: float) -> None:
    lenient = GateConfig(max_kl=1e8, max_difference=1e8)
    for ours, theirs in ((value, -1.0), (-1.0, value)):
        with pytest.raises(GateRefused) as refused:
            admit(1, probe(-1.0, ours), scored(-1.0, theirs), lenient)
        assert refused.value.mismatch == Mismatch(kl=WORST, difference=WORST)


def test_other_tokens_are_no_comparison() -> None:
    for given in ([], scored(-1.0), scored(-1.0, -1.0, -1.0)):
        with pytest.raises(ValueError, match="differ in length"):
            mismatch_of(probe(-1.0, -1.0), given)
    with pytest.raises(ValueError, match="differ in length"):
        mismatch_of(Probe(sequences=((1,),), logprobs=((),)), scored())
