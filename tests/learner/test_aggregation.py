import pytest

from learner.aggregation import token_weights
from learner.config import LossConfig


def test_by_hand() -> None:
    # Three completions, of 4 and 1 loss-bearing tokens and of none.
    assert token_weights([4, 1, 0], LossConfig()) == [0.2, 0.2, 0.2]
    assert token_weights([4, 1, 0], LossConfig(aggregation="sequence")) == pytest.approx([1 / 12, 1 / 3, 1 / 3])
    assert token_weights([4, 1, 0], LossConfig(aggregation="fixed", fixed_tokens=10)) == pytest.approx([1 / 30] * 3)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_nothing_to_weigh(aggregation: str) -> None:
    assert token_weights([], LossConfig(aggregation=aggregation)) == []  # type: ignore[arg-type]
    assert token_weights([0], LossConfig(aggregation=aggregation)) == [1.0]  # type: ignore[arg-type]
