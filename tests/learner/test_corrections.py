from typing import Any

import pytest
import torch

from learner.config import LossConfig
from learner.corrections import SequenceIndex, correction_weights

# Two sequences: ratios 2, 3 (product 6, geometric mean 2.449) and 0.5, 1.2 (0.6, 0.775).
RATIOS = [2.0, 3.0, 0.5, 1.2]
SEQUENCES = SequenceIndex(torch.tensor([0, 0, 1, 1]), 2)


@pytest.mark.parametrize(
    ("kind", "low", "cap", "weights", "cut"),
    [
        ("none", 0.0, 2.5, [1, 1, 1, 1], [0, 0, 0, 0]),
        ("token_tis", 0.0, 2.5, [2, 2.5, 0.5, 1.2], [0, 1, 0, 0]),
        ("token_tis", 0.8, 2.5, [2, 2.5, 0.8, 1.2], [0, 1, 1, 0]),
        ("sequence_tis", 0.0, 2.5, [2.5, 2.5, 0.6, 0.6], [1, 1, 0, 0]),
        ("token_mask", 0.8, 2.5, [2, 0, 0, 1.2], [0, 1, 1, 0]),
        ("sequence_mask", 0.0, 2.5, [0, 0, 0.6, 0.6], [1, 1, 0, 0]),
        ("sequence_mask", 0.7, 9.0, [6, 6, 0, 0], [0, 0, 1, 1]),
        ("geometric_mask", 0.7, 2.0, [0, 0, 1, 1], [1, 1, 0, 0]),
        ("geometric_mask", 0.8, 2.5, [1, 1, 0, 0], [0, 0, 1, 1]),
    ],
)
def test_by_hand(kind: Any, low: float, cap: float, weights: list[float], cut: list[int]) -> None:
    config = LossConfig(correction=kind, importance_low=low, importance_cap=cap)
    got, was_cut = correction_weights(torch.tensor(RATIOS).log(), SEQUENCES, config)
    assert got.tolist() == pytest.approx(weights)
    assert was_cut.int().tolist() == cut


@pytest.mark.parametrize("kind", ["token_tis", "sequence_tis", "token_mask", "sequence_mask", "geometric_mask"])
def test_ratios_that_overflow_stay_numbers(kind: Any) -> None:
    got, was_cut = correction_weights(torch.full((4,), 300.0), SEQUENCES, LossConfig(correction=kind))
    assert got.isfinite().all() and was_cut.all()


def test_means_of_sequences() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 6.0], requires_grad=True)
    means = SEQUENCES.means(values)
    assert means.tolist() == [2, 2, 5.5, 5.5]
    means[:2].sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 1, 0, 0]
