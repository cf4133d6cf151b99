"""Which steps of a run can be taken again, from which checkpoint, and whether they came out the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echelon.recorded_run import RecordedRun
from learner.checkpoint_folder import kept_checkpoints, read_trainer_state

SHOWN = ("loss/policy", "learner/grad_norm")


@dataclass(frozen=True)
class ReplayPlan:
    """steps: those to take. checkpoint: to begin from; None for the initial model."""

    steps: range
    checkpoint: Path | None


def plan_replay(recorded: RecordedRun, checkpoints_dir: Path, first: int | None, stop: int | None) -> ReplayPlan:
    """The steps asked for, and those before them from the nearest checkpoint on.

    Args: first, stop: as in a slice of steps; None for as many as there are.
    Raises: ValueError, in one line, where the journal or the checkpoints do not reach that far.
    """
    available = recorded.steps()
    starts = _starts(checkpoints_dir, available)
    if not starts:
        raise ValueError(
            "nothing to replay: the journal has no step that was taken after a checkpoint that is still there "
            "(journal.keep=true keeps all batches)"
        )
    stop = available.stop if stop is None else stop
    first = min(starts) if first is None else first
    if not first < stop <= available.stop:
        raise ValueError(f"--steps {first}:{stop}: the run's last step is {available.stop - 1}")
    if first < min(starts):
        raise ValueError(
            f"--steps {first}:{stop}: only steps from {min(starts)} on can be replayed, as older batches are gone "
            "(journal.keep=true keeps all)"
        )
    start = max(step for step in starts if step <= first)
    return ReplayPlan(range(start, stop), starts[start])


def _starts(checkpoints_dir: Path, available: range) -> dict[int, Path | None]:
    """Where a replay can begin: the step, and the checkpoint before it."""
    starts: dict[int, Path | None] = {0: None}
    starts |= {read_trainer_state(path).step: path for path in kept_checkpoints(checkpoints_dir)}
    return {step: path for step, path in starts.items() if step in available}


@dataclass(frozen=True)
class Difference:
    name: str
    recorded: float | None
    replayed: float


def first_difference(
    recorded: Mapping[str, float], replayed: Mapping[str, float], tolerance: float
) -> Difference | None:
    """The first figure of a step that came out another, losses first; figures of time are not among them.

    Args: tolerance: relative; 0 asks for the same bits.
    """
    for name in (*SHOWN, *sorted(replayed.keys() - set(SHOWN))):
        before, after = recorded.get(name), replayed[name]
        if before is None or not (before == after or math.isclose(before, after, rel_tol=tolerance, abs_tol=0.0)):
            return Difference(name, before, after)
    return None
