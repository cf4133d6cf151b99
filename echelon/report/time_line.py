"""Who was busy when, and why not otherwise, as far as the journal tells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from databus.codec import Array
from echelon.report.journal_facts import JournalFacts, natural
from echelon.report.series import column
from echelon.report.spans import Spans, shares

MAX_CELLS = 240
REASONS = {
    "busy": "at work",
    "learner": "idle while the learner trains: the staleness bound gives out no more",
    "rollouts": "the learner waits for a batch",
    "other": "idle although the learner waits too: evaluation, new weights, or no prompt left",
    "away": "the broker is away",
}
"""By name, what a cell of the time line may show."""


@dataclass(frozen=True)
class RoleLine:
    """shares: [reason] -> [cells], of each cell; what is missing to 1 lies outside its time. said: its totals."""

    name: str
    shares: dict[str, Array]
    said: str
    idle_share: float


@dataclass(frozen=True)
class TimeLine:
    """edges: [cells + 1], seconds since the journal's first record."""

    edges: Array
    roles: tuple[RoleLine, ...]

    @property
    def cell_s(self) -> float:
        return float(self.edges[1] - self.edges[0])


def time_line(journal: JournalFacts, rows: Sequence[dict[str, Any]]) -> TimeLine | None:
    """None where the journal bears no times."""
    if not journal.has_times:
        return None
    edges = np.linspace(journal.start, journal.end, MAX_CELLS + 1)
    away = journal.broker.gaps(journal.start, journal.end)
    roles = [_broker(journal, edges, away), _learner(journal, edges, away, rows)]
    names = sorted(journal.workers, key=natural)
    roles += [_worker(name, journal, edges, away) for name in names if journal.workers[name].starts]
    return TimeLine(edges - journal.start, tuple(role for role in roles if role is not None))


def _broker(journal: JournalFacts, edges: Array, away: Spans) -> RoleLine:
    said = f"up {duration(journal.broker.total())}" + (f", away {duration(away.total())}" if away.total() else "")
    return RoleLine("broker", {"busy": shares(journal.broker, edges), "away": shares(away, edges)}, said, 0.0)


def _learner(journal: JournalFacts, edges: Array, away: Spans, rows: Sequence[dict[str, Any]]) -> RoleLine | None:
    busy = journal.learner
    if not len(busy):
        return None
    idle = busy.gaps(float(busy.starts[0]), float(busy.ends[-1]))
    blocked = idle.within(away)
    total = busy.total() + idle.total()
    own = {name: column(rows, f"learner/{name}_s")[1].sum() for name in ("publish", "save")}
    said = f"has a batch {busy.total() / total:.0%} of its time, waits for one {idle.total() / total:.0%}"
    said += "".join(f"; {name} {duration(value)}" for name, value in own.items() if value >= 1)
    parts = {"busy": shares(busy, edges), "away": shares(blocked, edges)}
    parts["rollouts"] = shares(idle, edges) - parts["away"]
    return RoleLine("learner", parts, said, idle.total() / total)


def _worker(name: str, journal: JournalFacts, edges: Array, away: Spans) -> RoleLine:
    worker = journal.workers[name]
    busy = worker.busy()
    if not len(busy):  # its clock, or its records, make no sense
        return RoleLine(name, {}, "no lease with a time", 0.0)
    idle = busy.gaps(float(busy.starts[0]), float(busy.ends[-1]))
    blocked, bound = idle.within(away), idle.within(journal.learner)
    total = busy.total() + idle.total()
    rest = idle.total() - blocked.total() - bound.total()
    said = (
        f"has leases {busy.total() / total:.0%} of its time, {worker.tokens / max(1e-9, busy.total()):,.0f} tokens a "
        f"second of it; idle {bound.total() / total:.0%} behind the learner, {max(0.0, rest) / total:.0%} otherwise"
    )
    parts = {"busy": shares(busy, edges), "away": shares(blocked, edges), "learner": shares(bound, edges)}
    parts["other"] = np.maximum(0.0, shares(idle, edges) - parts["away"] - parts["learner"])
    return RoleLine(name, parts, said, idle.total() / total)


def worker_rates(journal: JournalFacts) -> dict[str, float]:
    """Tokens a second of the time in which a worker had leases."""
    busy = {name: worker.busy().total() for name, worker in journal.workers.items() if worker.tokens}
    return {name: journal.workers[name].tokens / seconds for name, seconds in busy.items() if seconds > 0}


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
