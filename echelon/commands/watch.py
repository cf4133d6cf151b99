"""`echelon watch`: the live view of a run, during the run or after it, from another shell or another machine."""

import argparse
import time
from pathlib import Path
from typing import Protocol

import msgspec

from databus.messages import Status
from echelon.config import RunConfig
from echelon.files import RowFollower
from echelon.joining import find_run
from echelon.observer import Observer
from echelon.progress import Progress, Row
from echelon.run_folder import BusRecord, RunFolder
from echelon.settings import flatten
from echelon.view import View, make_view

TICK_S = 0.2
ENDED = ("finished", "failed")


class Watched(Protocol):
    """What there is to see of a run."""

    def is_alive(self) -> bool: ...

    def status(self) -> Status | None:
        """A newer one than before, if there is one."""
        ...

    def new_rows(self) -> list[Row]: ...

    def close(self) -> None: ...


class WatchedFolder:
    """A run whose folder is at hand; it may be over."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._follower = RowFollower(folder.metrics_file)
        self._observer: Observer | None = None

    def is_alive(self) -> bool:
        """Does a process hold the folder?"""
        return self._folder.is_in_use()

    def status(self) -> Status | None:
        if self._observer is None and (bus := self._folder.bus()) is not None and self.is_alive():
            self._observer = Observer(bus)
        return None if self._observer is None else self._observer.poll()

    def new_rows(self) -> list[Row]:
        return self._follower.new_rows()

    def close(self) -> None:
        if self._observer is not None:
            self._observer.close()


class WatchedBroker:
    """A run elsewhere, as its broker tells of it."""

    def __init__(self, bus: BusRecord) -> None:
        self._observer = Observer(bus, with_rows=True)
        self._has_ended = False

    def is_alive(self) -> bool:
        return not self._observer.lost and not self._has_ended

    def status(self) -> Status | None:
        status = self._observer.poll()
        self._has_ended = status is not None and status.phase in ENDED
        return status

    def new_rows(self) -> list[Row]:
        return self._observer.new_rows()

    def close(self) -> None:
        self._observer.close()


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError where there is no run; BusError where nobody answers at the address, or it lets us not in."""
    progress, watched = _remote(args) if "://" in args.run else _local(args)
    view = make_view()
    view.start()
    try:
        _follow(watched, progress, view)
    finally:
        view.stop()
        watched.close()
    view.summary(progress)
    return 0


def _local(args: argparse.Namespace) -> tuple[Progress, Watched]:
    folder = RunFolder(args.run)
    config = folder.config()
    progress = _progress(folder.record().recipe, str(folder.path), config)
    progress.started = time.monotonic() - _age_s(folder)
    return progress, WatchedFolder(folder)


def _remote(args: argparse.Namespace) -> tuple[Progress, Watched]:
    run = find_run(args.run, Path(args.keys) if args.keys else None)
    recipe = run.bus.run_id.rpartition("-")[0]
    return _progress(recipe, f"{args.run} {run.reward_dir}", run.config), WatchedBroker(run.bus)


def _progress(recipe: str, where: str, config: RunConfig) -> Progress:
    return Progress(
        recipe=recipe,
        run_dir=where,
        steps=config.learner.steps,
        max_staleness=config.max_staleness,
        settings=flatten(msgspec.to_builtins(config)),
    )


def _age_s(folder: RunFolder) -> float:
    """Seconds that the run has been going, or went."""
    rows = folder.metrics_file
    until = time.time() if folder.is_in_use() or not rows.exists() else rows.stat().st_mtime
    return max(0.0, until - folder.record_file.stat().st_mtime)


def _follow(watched: Watched, progress: Progress, view: View) -> None:
    """Returns when the run is over, or says nothing any more."""
    alive = True
    while alive:
        alive = watched.is_alive()
        _update(progress, view, watched)
        if alive:
            time.sleep(TICK_S)


def _update(progress: Progress, view: View, watched: Watched) -> None:
    status = watched.status()
    if status is not None:
        progress.status = status
        if progress.enter(status.phase):
            view.phase(progress)
    rows = watched.new_rows()
    if rows:
        progress.add(rows)
        view.rows(progress, rows)
    view.update(progress)
