"""The table that a run ends with."""

import statistics

from rich import box
from rich.table import Table

from echelon.progress import Progress


def summary_table(progress: Progress) -> Table:
    table = Table(title=f"{progress.recipe}: {progress.steps_done} of {progress.steps} steps", box=box.ROUNDED)
    table.title_justify = "left"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.show_header = False
    for label, text in summary_lines(progress):
        table.add_row(label, text)
    return table


def summary_lines(progress: Progress) -> list[tuple[str, str]]:
    """(what, how it went) of a run."""
    lines: list[tuple[str, str]] = []
    if progress.evaluations:
        lines.append(("accuracy", _before_and_after(progress.evaluations)))
    if progress.rows:
        lines += _training(progress)
    lines += [
        ("wall time", duration(progress.elapsed_s)),
        ("run folder", progress.run_dir),
    ]
    if progress.steps_done == progress.steps:
        lines.append(("next", f"echelon export {progress.run_dir} OUT"))
    return lines


def _training(progress: Progress) -> list[tuple[str, str]]:
    first, last = progress.rows[0], progress.rows[-1]
    lag = progress.lag()
    assert lag is not None
    rates = [statistics.median(row[name] for row in progress.rows) for name in _RATES]
    groups = ", ".join(f"{last[f'ledger/{name}_groups']:.0f} {name}" for name in _ENDS)
    return [
        ("reward", f"{first['reward/mean']:.3f} → {last['reward/mean']:.3f}"),
        ("tokens/s", f"rollout {number(rates[0])}, learner {number(rates[1])} (medians of the steps)"),
        ("staleness", f"at most {lag[0]}, mean {lag[1]:.2f} versions; allowed {progress.max_staleness}"),
        ("groups", groups),
    ]


_RATES = ("rollout/tokens_per_s", "learner/tokens_per_s")
_ENDS = ("trained", "stale", "filtered", "failed")


def _before_and_after(evaluations: list[tuple[int, float]]) -> str:
    (_, before), (version, after) = evaluations[0], evaluations[-1]
    if len(evaluations) == 1:
        return f"{before:.3f} (version {version})"
    return f"{before:.3f} → [bold]{after:.3f}[/] ({after - before:+.3f}, greedy, held out, version {version})"


def duration(seconds: float) -> str:
    """`42 s`, `3:05`, `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float) -> str:
    """With separators, no decimals: `5,312`."""
    return f"{value:,.0f}"
