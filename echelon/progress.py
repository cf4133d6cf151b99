"""How far a run is: what the view shows and the final table sums up."""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from databus.messages import Status
from echelon.metrics import EVALUATION, TRAINED
from echelon.report.advice import Figures, advise

RECENT_ROWS = 10
ADVISE_EVERY_S = 10.0

Row = dict[str, Any]


@dataclass
class Progress:
    """Everything a view needs. `first_step` is where a resumed run went on; `started` is of `time.monotonic`.
    `settings`: by dotted name; `advice`: what they and the rows give, the weightiest first."""

    recipe: str
    run_dir: str
    steps: int
    max_staleness: int
    first_step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "starting"
    phase_started: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)
    status: Status | None = None
    rows: list[Row] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    _advised: float = -ADVISE_EVERY_S

    def enter(self, phase: str) -> bool:
        """Begin a phase; False where it is the present one."""
        if phase == self.phase:
            return False
        self.phase, self.phase_started = phase, time.monotonic()
        return True

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if EVALUATION in row:
                self.evaluations.append((row["step"], row[EVALUATION]))
            if TRAINED in row:
                self.rows.append(row)
        if time.monotonic() - self._advised >= ADVISE_EVERY_S:
            self._advised = time.monotonic()
            self.advice = [found.text for found in advise(Figures(self.rows, self.settings))]

    @property
    def steps_done(self) -> int:
        return self.rows[-1]["step"] + 1 if self.rows else self.first_step

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def phase_s(self) -> float:
        return time.monotonic() - self.phase_started

    def eta_s(self) -> float | None:
        """Seconds that the steps to come will take, by the pace of the last ones; None before there is one."""
        times = [row["time_s"] for row in self.rows[-RECENT_ROWS - 1 :]]
        gaps = [later - earlier for earlier, later in pairwise(times) if later > earlier]
        return statistics.fmean(gaps) * (self.steps - self.steps_done) if gaps else None

    def recent(self, name: str) -> float | None:
        """Mean over the last steps."""
        values = [row[name] for row in self.rows[-RECENT_ROWS:] if name in row]
        return statistics.fmean(values) if values else None

    def wait_share(self) -> float | None:
        """Share of its time that the learner waits for batches, over the last steps."""
        wait, step = self.recent("learner/wait_s"), self.recent("learner/step_s")
        return wait / (wait + step) if wait is not None and step is not None and wait + step > 0 else None

    def lag(self) -> tuple[int, float] | None:
        """(largest, mean) lag of all steps so far."""
        if not self.rows:
            return None
        largest = max(row["staleness/max_versions"] for row in self.rows)
        return int(largest), statistics.fmean(row["staleness/mean_versions"] for row in self.rows)
