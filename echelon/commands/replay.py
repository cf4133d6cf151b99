"""`echelon replay`: takes a run's steps again from its journal, and says whether they come out the same."""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echelon.config import RunConfig
from echelon.devices import visible_gpus
from echelon.failures import RunFailed, read_errors
from echelon.files import RowFollower
from echelon.packages import package_root
from echelon.processes import Child, stop_all
from echelon.ranks import start_ranks
from echelon.recorded_run import RecordedRun
from echelon.replay import SHOWN, ReplayPlan, first_difference, plan_replay
from echelon.roles.replay import ROLE, ROWS
from echelon.run_folder import RunFolder

POLL_S = 0.1
GRACE_S = 10.0


class ReplayDiffers(RuntimeError):
    """A step came out otherwise than the run recorded it; the text says which."""


def execute(args: argparse.Namespace) -> int:
    """Raises: ReplayDiffers; RunFailed where the replay itself fails; ValueError for what cannot be replayed."""
    folder = RunFolder(args.run_dir)
    config = folder.config()
    if folder.is_in_use():
        raise ValueError(f"{folder.path} is in use: replay the run once it has ended")
    first, stop = parse_steps(args.steps)
    recorded = RecordedRun(folder.journal, config)
    plan = plan_replay(recorded, folder.checkpoints, first, stop)
    sys.stdout.write(f"from {plan.checkpoint.name if plan.checkpoint else 'the initial model'}\n{header()}\n")
    with tempfile.TemporaryDirectory(prefix="echelon-replay-") as out:
        for step, metrics in _replayed(folder, config, plan, recorded.max_staleness(plan.steps), Path(out)):
            _compare(step, recorded.metrics[step], metrics, args.tolerance)
    sys.stdout.write(f"{len(plan.steps)} steps came out the same\n")
    return 0


def parse_steps(text: str) -> tuple[int | None, int | None]:
    """`a:b`, either of which may be left out. Raises: ValueError."""
    first, colon, stop = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (first, stop)):
        raise ValueError(f"--steps {text}: expected FIRST:STOP, whole numbers or nothing, as in 20:30 or 20:")
    return int(first) if first else None, int(stop) if stop else None


def _replayed(
    folder: RunFolder, config: RunConfig, plan: ReplayPlan, max_staleness: int, out: Path
) -> Iterator[tuple[int, dict[str, float]]]:
    """Each step with its metrics, as it is taken."""
    arguments = [f"echelon.roles.{ROLE}", str(folder.path), str(out), "--stop", str(plan.steps.stop)]
    arguments += ["--max-staleness", str(max_staleness)]
    if plan.checkpoint is not None:
        arguments += ["--checkpoint", str(plan.checkpoint)]
    log = folder.log_file(ROLE)
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    child = start_ranks(ROLE, arguments, config, package_root(), visible_gpus(), log)
    try:
        for row in _follow(RowFollower(out / ROWS), len(plan.steps), child, out, config.watchdog_s):
            yield row["step"], row["metrics"]
    finally:
        stop_all([child], GRACE_S)


def _follow(follower: RowFollower, count: int, child: Child, out: Path, patience_s: float) -> Iterator[dict[str, Any]]:
    """`count` rows. Raises: RunFailed where they do not come."""
    deadline = time.monotonic() + patience_s
    while count:
        has_ended = child.exit_code() is not None
        rows = follower.new_rows()
        if rows:
            deadline = time.monotonic() + patience_s
            count -= len(rows)
            yield from rows
        elif has_ended:
            raise _failure(child, out)
        elif time.monotonic() > deadline:
            raise RunFailed(f"the replay took no step within {patience_s:.0f} s (log: {child.log})")
        else:
            time.sleep(POLL_S)


def _failure(child: Child, out: Path) -> RunFailed:
    reports = sorted(read_errors(out), key=lambda report: report.time)
    what = reports[0].message if reports else child.how_it_ended()
    return RunFailed(f"the replay failed: {what} (log: {child.log})")


def _compare(step: int, recorded: dict[str, float], replayed: dict[str, float], tolerance: float) -> None:
    difference = first_difference(recorded, replayed, tolerance)
    figures = "".join(f"{replayed[name]!r:>26}" for name in SHOWN)
    sys.stdout.write(f"{step:>6}{figures}  {'same' if difference is None else 'differs'}\n")
    sys.stdout.flush()
    if difference is not None:
        raise ReplayDiffers(
            f"step {step} differs: {difference.name} was {difference.recorded!r}, is now {difference.replayed!r}"
        )


def header() -> str:
    return f"{'step':>6}" + "".join(f"{name:>26}" for name in SHOWN)
