"""Does metrics.jsonl say what the journal says?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from echelon.audit.batches import TakenStep
from echelon.audit.violation import Findings
from echelon.metrics import TRAINED

TOLERANCE = 1e-6
"""Relative: means of float32 rewards, summed in another order."""


def check_rows(
    rows: Sequence[Mapping[str, Any]],
    steps: Mapping[int, TakenStep],
    first_step: int,
    findings: Findings,
    is_complete: bool,
) -> None:
    """Args: first_step: where the journal begins. is_complete: the broker has written all rows that it owed; else the
    last ones may be missing.
    """
    trained = [row for row in rows if TRAINED in row]
    numbers = [row["step"] for row in trained]
    for before, after in zip([-1, *numbers], numbers, strict=False):
        if after != before + 1:
            findings.add("metrics", f"the row after that of step {before} is of step {after}", step=after)
    for number in sorted(steps.keys() - set(numbers)):
        if is_complete or number < max(numbers, default=-1):
            findings.add("metrics", "taken, but metrics.jsonl has no row of it", step=number)
    for row in trained:
        taken = steps.get(row["step"])
        if taken is not None:
            _check_row(row, taken, findings)
        elif row["step"] >= first_step:
            findings.add("metrics", "metrics.jsonl has a row of it, but the journal does not", step=row["step"])


def _check_row(row: Mapping[str, Any], taken: TakenStep, findings: Findings) -> None:
    """The learner's figures win where a name is in both, as they do in a row."""
    for name, expected in sorted((taken.row | taken.metrics).items()):
        if not _agree(row.get(name), expected):
            what = f"metrics.jsonl has {name} {row.get(name)}, the journal {expected}"
            findings.add("metrics", what, step=row["step"])


def _agree(found: object, expected: float) -> bool:
    """JSON has null for what is not finite."""
    if not isinstance(found, int | float):
        return found is None and not math.isfinite(expected)
    return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
