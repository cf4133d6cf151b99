"""Processor time of a run's roles, by what their processes below this one have used."""

import threading
from pathlib import Path

import psutil

SAMPLE_S = 0.5


class RoleCpu(threading.Thread):
    """Looks again and again while a run goes, from `start` to `stop`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self._rows = run_dir / "metrics.jsonl"
        self._used: dict[int, tuple[str, float]] = {}
        self._looks: list[tuple[int, dict[str, float]]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._look()
            self._looks.append((self._num_rows(), self._seconds()))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def between(self, first: int, last: int) -> tuple[int, dict[str, float]]:
        """(steps, seconds by role) from the first look after `first` rows of metrics to the last one with no more than
        `last`."""
        looks = [look for look in self._looks if first <= look[0] <= last]
        (first, before), (last, after) = looks[0], looks[-1]
        return last - first, {role: seconds - before.get(role, 0.0) for role, seconds in after.items()}

    def _look(self) -> None:
        for child in psutil.Process().children(recursive=True):
            try:
                role = role_of(child)
                times = child.cpu_times()
            except psutil.Error:
                continue
            if role:
                self._used[child.pid] = (role, times.user + times.system)

    def _seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for role, seconds in self._used.values():
            totals[role] = totals.get(role, 0.0) + seconds
        return totals

    def _num_rows(self) -> int:
        return len(self._rows.read_bytes().splitlines()) if self._rows.exists() else 0


def role_of(process: psutil.Process) -> str:
    """The role that a process is, or is a child of."""
    for each in [process, *process.parents()]:
        for word in each.cmdline():
            if word.startswith("echelon.roles."):
                return word.removeprefix("echelon.roles.")
    return ""
