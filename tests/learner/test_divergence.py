from typing import Any

import pytest
import torch

from learner.divergence import divergence

P = torch.tensor([0.5, 0.3, 0.2]).double()
Q = torch.tensor([0.2, 0.2, 0.6]).double()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_right_in_the_mean(estimator: Any) -> None:
    """The mean under p is KL(p ‖ q), here of two distributions over three outcomes."""
    exact = (P * (P / Q).log()).sum()
    assert torch.isclose((P * divergence((Q / P).log(), estimator)).sum(), exact)


@pytest.mark.parametrize(("estimator", "right"), [("k1", False), ("k2", True), ("k3", False)])
def test_only_k2_has_the_right_gradient_as_a_loss(estimator: Any, right: bool) -> None:
    """The gradient of the mean, outcomes drawn and then held fixed, against that of the divergence itself."""
    logits = P.log().clone().requires_grad_()
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - Q.log())).sum(), logits, retain_graph=True)
    (sampled,) = torch.autograd.grad((P * divergence(Q.log() - log_p, estimator)).sum(), logits)
    assert torch.allclose(sampled, exact) == right
    if estimator == "k1":
        assert torch.allclose(sampled, torch.zeros(3).double())
