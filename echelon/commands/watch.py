"""`echelon watch`: the live view of a run, from another shell, during the run or after it."""

import argparse
import time

from echelon.files import RowFollower
from echelon.observer import Observer
from echelon.progress import Progress
from echelon.run_folder import RunFolder
from echelon.view import View, make_view

TICK_S = 0.2
SILENT_S = 5.0


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError where RUN_DIR is no run's folder."""
    folder = RunFolder(args.run_dir)
    config = folder.config()
    progress = Progress(
        recipe=folder.record().recipe,
        run_dir=str(folder.path),
        steps=config.learner.steps,
        max_staleness=config.max_staleness,
    )
    progress.started = time.monotonic() - _age_s(folder)
    view = make_view()
    view.start()
    try:
        _follow(folder, progress, view)
    finally:
        view.stop()
    view.summary(progress)
    return 0


def _age_s(folder: RunFolder) -> float:
    """Seconds that the run has been going, or went."""
    rows = folder.metrics_file
    until = time.time() if folder.is_in_use() or not rows.exists() else rows.stat().st_mtime
    return max(0.0, until - folder.record_file.stat().st_mtime)


def _follow(folder: RunFolder, progress: Progress, view: View) -> None:
    """Returns when nobody holds the run folder any more."""
    follower = RowFollower(folder.metrics_file)
    observer: Observer | None = None
    alive = True
    while alive:
        alive = folder.is_in_use()
        bus = folder.bus()
        if alive and bus is not None and observer is None:
            observer = Observer(bus)
        _update(progress, view, follower, observer)
        if alive:
            time.sleep(TICK_S)
    if observer is not None:
        observer.close()


def _update(progress: Progress, view: View, follower: RowFollower, observer: Observer | None) -> None:
    status = observer.poll() if observer is not None else None
    if status is not None:
        progress.status = status
        if progress.enter(status.phase):
            view.phase(progress)
    rows = follower.new_rows()
    if rows:
        progress.add(rows)
        view.rows(progress, rows)
    view.update(progress)
