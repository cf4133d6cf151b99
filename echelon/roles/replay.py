"""`python -m echelon.roles.replay RUN_DIR OUT --stop N ...`: one rank of a replay.

Rank 0 appends a row a step to OUT/rows.jsonl: its number and its metrics.
"""

import argparse
import os
from pathlib import Path

from databus.process import run_as_program
from echelon.errors import role_main
from echelon.metrics import RowWriter
from echelon.recorded_run import RecordedBus, RecordedRun
from echelon.run_folder import RunFolder
from echelon.user_function import load_advantage

ROLE = "replay"
ROWS = "rows.jsonl"
TIMEOUT_S = 600.0


def replay(folder: RunFolder, out: Path, stop: int, max_staleness: int, checkpoint: Path | None) -> None:
    """Raises: whatever ends the replay; `role_main` reports it."""
    from learner.replay import replay_steps
    from learner.run import LearnerRun

    config = folder.config()
    run = LearnerRun(
        model=config.model,
        serving_dtype=config.rollout.dtype,
        temperature=config.rollout.temperature,
        max_staleness=max_staleness,
        seed=config.seed,
        checkpoints_dir=folder.checkpoints,
        bus_address="",
        resume_from=checkpoint,
        batch_timeout_s=TIMEOUT_S,
        collective_timeout_s=TIMEOUT_S,
        advantage_function=load_advantage(config, folder.path),
    )
    rows = RowWriter(out / ROWS)
    replay_steps(
        config.learner,
        run,
        stop,
        lambda first: RecordedBus(RecordedRun(folder.journal, config)),
        lambda step, metrics: rows.write({"step": step, "metrics": metrics}),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("out", type=Path)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--max-staleness", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    role = ROLE if rank == 0 else f"{ROLE}-rank{rank}"
    folder = RunFolder(args.run_dir)
    return role_main(
        role,
        args.out / f"{role}.error.json",
        lambda: replay(folder, args.out, args.stop, args.max_staleness, args.checkpoint),
    )


if __name__ == "__main__":
    run_as_program(main)
