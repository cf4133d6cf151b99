"""The live view of a run on a terminal, and plain lines where there is none."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from databus.messages import Status, WorkerStatus
from echelon.metrics import EVALUATION
from echelon.progress import Progress, Row
from echelon.summary import duration, number, summary_table

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 40
MAX_LINE = 1000
MAX_NAMED = 4
MAX_ADVICE = 2
REFRESH_S = 2.0
"""Between drawings where nothing has happened: what changes then is seconds."""
LABEL_WIDTH = len("next batch")


class PlainView:
    """A line a step, as a log would want it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def phase(self, progress: Progress) -> None:
        self.note(progress.phase)

    def rows(self, progress: Progress, rows: list[Row]) -> None:
        for row in rows:
            self.note(step_line(progress, row))

    def update(self, progress: Progress) -> None:
        pass

    def note(self, text: str) -> None:
        self._console.out(text)
        self._console.file.flush()

    def summary(self, progress: Progress) -> None:
        # A pipe has no width: rich would take 80 columns and fold the paths, whatever width `print` is given.
        self._console.width = max(MAX_LINE, self._console.width)
        self._console.print(summary_table(progress), crop=False)


class LiveView:
    """A panel that stays in place; it goes at the end, and the summary stays."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def phase(self, progress: Progress) -> None:
        self._draw(progress)

    def rows(self, progress: Progress, rows: list[Row]) -> None:
        self._draw(progress)

    def update(self, progress: Progress) -> None:
        if time.monotonic() - self._drawn >= REFRESH_S:
            self._draw(progress)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def summary(self, progress: Progress) -> None:
        self._console.print(summary_table(progress))

    def _draw(self, progress: Progress) -> None:
        self._drawn = time.monotonic()
        self._live.update(panel(progress), refresh=True)


View = LiveView | PlainView
"""`start`, then any of the others as often as one likes, then `stop`, then `summary`."""


def make_view() -> View:
    console = Console(highlight=False)
    return LiveView(console) if console.is_terminal and sys.stdout.isatty() else PlainView(console)


def step_line(progress: Progress, row: Row) -> str:
    """One step, or the final evaluation, in one line."""
    parts = [f"step {row['step']:>{len(str(progress.steps))}}/{progress.steps}"]
    if "reward/mean" in row:
        parts += [
            f"reward {row['reward/mean']:.3f}",
            f"lag ≤{row['staleness/max_versions']:.0f} (mean {row['staleness/mean_versions']:.1f})",
            f"rollout {number(row['rollout/tokens_per_s'])} tok/s",
            f"learner {number(row['learner/tokens_per_s'])} tok/s",
            f"step {row['learner/step_s']:.1f} s + wait {row['learner/wait_s']:.1f} s",
        ]
    if EVALUATION in row:
        parts.append(f"accuracy {row[EVALUATION]:.3f}")
    eta = progress.eta_s()
    if eta is not None and "reward/mean" in row and progress.steps_done < progress.steps:
        parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)


def panel(progress: Progress) -> Panel:
    """The whole view."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH)
    facts.add_column(ratio=1)
    for label, text in _facts(progress):
        facts.add_row(label, text)
    title = Text.assemble((progress.recipe, "bold"), "  ", (progress.run_dir, "dim"))
    return Panel(Group(_bar(progress), facts), title=title, title_align="left", border_style="cyan", padding=(0, 1))


def _bar(progress: Progress) -> Table:
    eta = progress.eta_s()
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    left = f"ETA [bold]{duration(eta)}[/]" if eta is not None else ""
    line.add_row(
        f"step [bold]{progress.steps_done}[/]/{progress.steps}",
        ProgressBar(total=progress.steps, completed=progress.steps_done),
        f"{left}  [dim]elapsed {duration(progress.elapsed_s)}[/]",
    )
    return line


def _facts(progress: Progress) -> list[tuple[str, str]]:
    facts = [("phase", f"{progress.phase} ({duration(progress.phase_s)})")]
    if progress.evaluations:
        facts.append(("accuracy", _accuracy(progress)))
    if progress.rows:
        facts += _training(progress)
    if progress.status is not None:
        facts += _roles(progress)
    return facts


def _accuracy(progress: Progress) -> str:
    (_, first), (version, last) = progress.evaluations[0], progress.evaluations[-1]
    if len(progress.evaluations) == 1:
        return f"[bold]{first:.3f}[/] [dim]version {version}[/]"
    curve = sparkline([value for _, value in progress.evaluations])
    return f"{first:.3f} → [bold]{last:.3f}[/] {curve} [dim]version {version}[/]"


def _training(progress: Progress) -> list[tuple[str, str]]:
    rewards = [row["reward/mean"] for row in progress.rows]
    rollout, learner = progress.recent("rollout/tokens_per_s"), progress.recent("learner/tokens_per_s")
    lag, wait = progress.lag(), progress.wait_share()
    assert rollout is not None and learner is not None and lag is not None
    waits = f"waits {wait:.0%} of its time" if wait is not None else ""
    facts = [
        ("reward", f"[bold]{rewards[-1]:.3f}[/] {sparkline(rewards[-SPARK_STEPS:])}"),
        ("lag", f"at most {lag[0]}, mean {lag[1]:.2f} [dim]bound {progress.max_staleness}[/]"),
        ("rollout", f"{number(rollout)} tok/s{_drafting(progress)}"),
        ("learner", f"{number(learner)} tok/s, {waits}"),
    ]
    return facts + [("advice", escape(text)) for text in progress.advice[:MAX_ADVICE]]


def _drafting(progress: Progress) -> str:
    acceptance, accepted = progress.recent("draft/acceptance"), progress.recent("draft/accepted_per_round")
    if not acceptance or not accepted:
        return ""
    return f", drafts: {accepted:.2f} accepted a round, {acceptance:.0%} of those drafted"


def _roles(progress: Progress) -> list[tuple[str, str]]:
    status = progress.status
    assert status is not None
    counts = "  ".join(f"{name} {status.counts.get(name, 0)}" for name in ("trained", "stale", "filtered", "failed"))
    learner = f"learner v{status.version}" if status.learner_ready else "no learner yet"
    return [
        ("now", _now(status)),
        ("next batch", _next_batch(status)),
        ("versions", f"{learner}, {_workers(status.workers)}"),
        ("speed", _speed(status.workers)),
        ("groups", f"{counts}  [dim]queued {status.queued_groups}, running {status.running_groups}[/]"),
        *[("drained", f"[yellow]{escape(name)}: {escape(why)}[/]") for name, why in status.drained.items()],
        *([("gate", f"[yellow]{escape(status.refusal)}[/]")] if status.refusal else []),
        *([("disk", f"[red]nothing is acknowledged: {escape(status.disk_full)}[/]")] if status.disk_full else []),
    ]


def _now(status: Status) -> str:
    """Who waits for whom."""
    if status.training_s > 0:
        idle = sum(worker.running_sequences == 0 for worker in status.workers)
        waiting = f", {idle} of {len(status.workers)} workers wait for it" if idle else ""
        return f"the learner has had its batch for {duration(status.training_s)}{waiting}"
    if status.requested:
        return "the learner waits for a batch"
    return f"the learner has been silent for {duration(status.learner_silent_s)}"


def _next_batch(status: Status) -> str:
    here = min(status.queued_groups, status.batch_groups)
    text = f"{here} of {status.batch_groups} groups are in, {status.running_groups} running"
    return text + (f", the oldest for {duration(status.oldest_lease_s)}" if status.running_groups else "")


def _workers(workers: Sequence[WorkerStatus]) -> str:
    """Each by name where they are few, else how many serve which version."""
    if len(workers) <= MAX_NAMED:
        return ", ".join(map(_worker, workers)) or "no worker yet"
    versions = Counter(worker.version for worker in workers)
    standings = Counter(worker.standing for worker in workers if worker.standing != "working")
    parts = [f"{number} at v{version}" for version, number in sorted(versions.items(), reverse=True)]
    return f"workers: {', '.join(parts + [f'{number} {name}' for name, number in standings.items()])}"


def _worker(worker: WorkerStatus) -> str:
    standing = "" if worker.standing == "working" else f" ({worker.standing})"
    return f"{worker.name} v{worker.version}{standing}"


def _speed(workers: Sequence[WorkerStatus]) -> str:
    """Of the engines, and which is the slowest, where there are several."""
    rates = [worker.tokens_per_s for worker in workers]
    running = sum(worker.running_sequences for worker in workers)
    text = f"{number(sum(rates))} tok/s now, {running} sequences run"
    if len(workers) > 1:
        slowest = min(workers, key=lambda worker: worker.tokens_per_s)
        median = statistics.median(rates)
        text += f"; slowest {slowest.name}, {number(slowest.tokens_per_s)} tok/s (median {number(median)})"
    return text


def sparkline(values: list[float]) -> str:
    """A bar a value, between their smallest and largest."""
    low, high = min(values), max(values)
    if high == low:
        return SPARKS[0] * len(values)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in values)
