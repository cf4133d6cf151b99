"""What share of a core does `echelon watch` take, with many workers and many steps behind it?

    python benchmarks/bench_watch.py --json benchmarks/results/bench_watch.json

The live view draws on a terminal of 160 columns as `watch` does: a look every 0.2 s, the broker's word every 0.5 s, a
row of metrics every second, after 10,000 steps, with 1 and with 50 workers, in turns. Counted is the CPU time of this
process.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import Bar, hardware, write_result
from rich.console import Console

from databus.messages import Status, WorkerStatus
from echelon.commands.watch import TICK_S, _update
from echelon.metrics import REQUIRED
from echelon.observer import ASK_EVERY_S
from echelon.progress import Progress, Row
from echelon.view import LiveView

STEPS = 10_000
WORKERS = (1, 50)
ROW_EVERY_S = 1.0


class Rehearsed:
    """A run that says and writes what a real one would."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._step = STEPS
        self._asked = self._written = time.monotonic()

    def is_alive(self) -> bool:
        return True

    def status(self) -> Status | None:
        if time.monotonic() - self._asked < ASK_EVERY_S:
            return None
        self._asked = time.monotonic()
        workers = tuple(
            WorkerStatus(
                name=f"worker-{index}",
                version=self._step - index % 3,
                leased_groups=4,
                running_sequences=64,
                tokens_per_s=3000.0 + index,
                silent_s=0.1,
            )
            for index in range(self._num_workers)
        )
        return Status(
            phase="running",
            step=self._step,
            steps=2 * STEPS,
            version=self._step,
            learner_ready=True,
            workers=workers,
            running_groups=4 * self._num_workers,
            queued_groups=7,
            counts={"trained": 16 * self._step, "stale": 9, "filtered": 0, "failed": 0},
            last_progress_s=0.1,
            training_s=time.monotonic() % 3,
            batch_groups=16,
            oldest_lease_s=4.0,
        )

    def new_rows(self) -> list[Row]:
        if time.monotonic() - self._written < ROW_EVERY_S:
            return []
        self._written, self._step = time.monotonic(), self._step + 1
        return [make_row(self._step)]

    def close(self) -> None: ...


def make_row(step: int) -> Row:
    row: dict[str, Any] = {name: 1.0 + (step * 7919 % 100) / 100 for name in REQUIRED}
    return row | {"step": step, "time_s": 1.0 * step}


def core_share(num_workers: int, seconds: float) -> float:
    """CPU time over time."""
    progress = Progress(recipe="bench", run_dir="runs/bench", steps=2 * STEPS, max_staleness=2)
    progress.add([make_row(step) for step in range(STEPS)])
    with Path(os.devnull).open("w") as nowhere:
        view = LiveView(Console(file=nowhere, width=160, height=50, force_terminal=True))
        watched = Rehearsed(num_workers)
        view.start()
        began, used = time.monotonic(), time.process_time()
        while time.monotonic() - began < seconds:
            _update(progress, view, watched)
            time.sleep(TICK_S)
        share = (time.process_time() - used) / (time.monotonic() - began)
        view.stop()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    shares: dict[int, list[float]] = {number: [] for number in WORKERS}
    for _ in range(args.repeats):
        for number in WORKERS:
            shares[number].append(core_share(number, args.seconds))
            print(f"{number} workers: {shares[number][-1]:.2%} of a core")
    medians = {f"{number} workers": statistics.median(values) for number, values in shares.items()}
    most = medians["50 workers"]
    write_result(
        args.json,
        question="What share of a core does `echelon watch` take, with many workers and many steps behind it?",
        figures={"share_of_a_core": medians, "steps_behind": STEPS},
        peers={},
        bars=[Bar("share of a core at 50 workers", most, 0.05, "at most")],
        device=hardware(),
    )


if __name__ == "__main__":
    main()
