"""Are checkpoints whole, and do their positions agree with the journal?"""

from collections.abc import Mapping
from pathlib import Path

from databus.messages import Position
from databus.records import StateSaved
from echelon.audit.violation import Findings
from learner.checkpoint_folder import checkpoint_path, kept_checkpoints, read_trainer_state, verify_files


def check_checkpoints(
    checkpoints_dir: Path, states: Mapping[int, StateSaved], num_steps: int, findings: Findings
) -> int:
    """Args: states: saved ones, by segment. num_steps: those that the run has taken.

    Returns: how many checkpoints there are.
    """
    checkpoints = kept_checkpoints(checkpoints_dir)
    for checkpoint in checkpoints:
        try:
            state = read_trainer_state(checkpoint)
            verify_files(checkpoint, state)
        except ValueError as error:
            findings.add("checkpoint", str(error))
            continue
        if checkpoint != checkpoint_path(checkpoint.parent, state.step):
            findings.add("checkpoint", f"{checkpoint.name} says that it is of step {state.step}", step=state.step)
        if state.step > num_steps:
            what = f"a checkpoint after {state.step} steps, the journal has {num_steps}"
            findings.add("checkpoint", what, step=state.step)
        if state.position is not None:
            _check_position(state.position, states, findings)
    return len(checkpoints)


def _check_position(position: Position, states: Mapping[int, StateSaved], findings: Findings) -> None:
    """Where its segment is gone there is nothing to compare with."""
    saved = [state for state in states.values() if state.step == position.step]
    for name in ("next_cursor", "pending", "counts"):
        if saved and getattr(saved[-1], name) != getattr(position, name):
            what = f"{name} {getattr(position, name)} in the checkpoint, {getattr(saved[-1], name)} in the journal"
            findings.add("checkpoint", what, step=position.step)
