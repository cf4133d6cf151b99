"""How good predictions were, and whether what was trained differs from what was dispatched."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from databus.codec import Array

logger = logging.getLogger(__name__)

CLASSES = ("short", "medium", "long")
WINDOW_GROUPS = 512
MIN_DROPPED = 16
ALARM_Z = 4.0
"""Standard errors between trained and dropped groups that raise the alarm: chance alone gives it once in 10,000."""


class Dispatched(NamedTuple):
    """What was known of a group when its problem was given out; `length`, `pass_rate` are put right when it comes in.

    length: tokens a completion, 0 where not known. length_class: index in `CLASSES`, by thirds of the data set.
    """

    length: float
    pass_rate: float
    length_class: int


class Report:
    """Collects between steps; `row` closes a step.

    Only groups whose fate is known count as dispatched, trained or not: those still being generated would make the
    comparison one of fast with slow.
    """

    def __init__(self) -> None:
        self._predicted: list[float] = []
        self._actual: list[float] = []
        self._settled: deque[tuple[Dispatched, bool]] = deque(maxlen=WINDOW_GROUPS)
        self._alarmed = False

    def completed(self, predicted: float, actual: float) -> None:
        """A group came in: predicted (0: not known) and actual mean tokens of its completions."""
        if predicted > 0:
            self._predicted.append(predicted)
            self._actual.append(actual)

    def settled(self, group: Dispatched, trained: bool) -> None:
        self._settled.append((group, trained))

    def row(self) -> dict[str, float]:
        metrics = self._prediction() | self._selection()
        self._predicted.clear()
        self._actual.clear()
        return {f"difficulty/{name}": value for name, value in metrics.items()}

    def _prediction(self) -> dict[str, float]:
        if not self._actual:
            return {}
        predicted, actual = np.array(self._predicted), np.array(self._actual)
        return {
            "length_predicted": float(predicted.mean()),
            "length_actual": float(actual.mean()),
            "length_error_ratio": float(np.abs(predicted - actual).mean() / actual.mean()),
            "length_bias_ratio": float(predicted.mean() / actual.mean() - 1),
        }

    def _selection(self) -> dict[str, float]:
        if not self._settled:
            return {}
        trained = np.array([kept for _, kept in self._settled])
        groups = [group for group, _ in self._settled]
        columns = {"pass_rate": [g.pass_rate for g in groups], "length": [g.length for g in groups]}
        row = _shares(groups, trained)
        scores = []
        for name, values in columns.items():
            array = np.array(values)
            row[f"{name}_dispatched"] = float(array.mean())
            if trained.any():
                row[f"{name}_trained"] = float(array[trained].mean())
            scores.append(z_score(array[trained], array[~trained]))
        row["selection_z"] = max(map(abs, scores))
        row["selection_alarm"] = float(row["selection_z"] > ALARM_Z)
        self._warn(row)
        return row

    def _warn(self, row: dict[str, float]) -> None:
        if row["selection_alarm"] and not self._alarmed:
            logger.warning(
                "selection bias: what is trained differs from what was dispatched (pass rate %.3f against %.3f, "
                "length %.0f against %.0f)",
                row["pass_rate_trained"], row["pass_rate_dispatched"], row["length_trained"], row["length_dispatched"],
            )  # fmt: skip
        self._alarmed = bool(row["selection_alarm"])


def z_score(trained: Array, dropped: Array) -> float:
    """Difference of the two means in its standard errors (Welch); 0 while there is too little to compare."""
    if len(dropped) < MIN_DROPPED or len(trained) < MIN_DROPPED:
        return 0.0
    error = np.sqrt(trained.var(ddof=1) / len(trained) + dropped.var(ddof=1) / len(dropped))
    return float((trained.mean() - dropped.mean()) / max(error, 1e-9))


def _shares(groups: Sequence[Dispatched], trained: Array) -> dict[str, float]:
    classes = np.array([group.length_class for group in groups])
    row: dict[str, float] = {}
    for index, name in enumerate(CLASSES):
        row[f"{name}_dispatched_share"] = float((classes == index).mean())
        if trained.any():
            row[f"{name}_trained_share"] = float((classes[trained] == index).mean())
    return row
