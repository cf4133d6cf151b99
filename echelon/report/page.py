"""The report as one HTML file: no script, no font, no picture from elsewhere."""

import time
from collections.abc import Callable, Sequence
from html import escape

from echelon.report.advice import Figures, advise, wait_share
from echelon.report.charts import (
    draft_charts,
    length_charts,
    mismatch_charts,
    reward_charts,
    selection_charts,
    speed_charts,
    staleness_charts,
)
from echelon.report.run_facts import RunFacts
from echelon.report.samples_section import samples_section
from echelon.report.series import column
from echelon.report.style import STYLE
from echelon.report.svg import number
from echelon.report.time_line import RoleLine, duration, time_line, worker_rates
from echelon.report.time_line_chart import time_line_chart

FATES = ("trained", "stale", "filtered", "failed", "expired")
NO_FIGURES = "Nothing of this was recorded in this run."


def render(runs: Sequence[RunFacts]) -> str:
    """The whole page. Args: runs: one, or several to compare."""
    title = " and ".join(run.name for run in runs)
    sections = [
        ("advice", "Advice", _advice(runs)),
        ("totals", "Totals", _totals(runs)),
        ("reward", "Reward and accuracy", _grid(reward_charts(runs))),
        ("staleness", "Staleness", _grid(staleness_charts(runs))),
        ("time", "Who worked when", _time(runs) + _grid(speed_charts(runs))),
        ("length", "Length, prediction and difficulty", _grid(length_charts(runs))),
        ("drafting", "Drafting", _grid(draft_charts(runs))),
        ("mismatch", "Mismatch, sample size and clipping", _grid(mismatch_charts(runs))),
        ("selection", "Dispatched and trained", _alarms(runs) + _grid(selection_charts(runs))),
        ("samples", "Sampled completions", samples_section(runs)),
    ]
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>' for name, heading, html in sections
    )
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · Echelon</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f"<p>{escape(', '.join(sorted({run.recipe for run in runs})))} · made {made}</p>{_notes(runs)}"
        f"<nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


def figures_of(run: RunFacts) -> Figures:
    """What advice is drawn from, the journal's part included."""
    line = None if run.journal is None else time_line(run.journal, run.rows)
    return _figures(run, () if line is None else line.roles)


def _figures(run: RunFacts, roles: Sequence[RoleLine]) -> Figures:
    workers = [role.idle_share for role in roles if role.name not in ("broker", "learner")]
    rates = {} if run.journal is None else worker_rates(run.journal)
    return Figures(run.rows, run.settings, rates, sum(workers) / len(workers) if workers else None)


def _notes(runs: Sequence[RunFacts]) -> str:
    notes = [(run.name, note) for run in runs for note in run.notes]
    lines = "".join(f"<li>{escape(f'{name}: ' if len(runs) > 1 else '')}{escape(note)}</li>" for name, note in notes)
    return f'<ul class="notes">{lines}</ul>' if notes else ""


def _advice(runs: Sequence[RunFacts]) -> str:
    parts = []
    for run in runs:
        found = advise(figures_of(run))
        lines = "".join(f"<li>{escape(advice.text)}</li>" for advice in found)
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(heading + (f"<ol>{lines}</ol>" if found else "<p>Nothing stands out.</p>"))
    return "".join(parts)


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if charts else f"<p class=note>{NO_FIGURES}</p>"


def _time(runs: Sequence[RunFacts]) -> str:
    parts = []
    for run in runs:
        line = None if run.journal is None else time_line(run.journal, run.rows)
        if line is not None:
            rows = "".join(f"<tr><th>{escape(role.name)}</th><td>{escape(role.said)}</td></tr>" for role in line.roles)
            table = f"<details><summary>Totals of {escape(run.name)}</summary><table>{rows}</table></details>"
            parts.append(f'<div class="wide">{time_line_chart(line, run.name)}{table}</div>')
    return "".join(parts)


def _alarms(runs: Sequence[RunFacts]) -> str:
    parts = []
    for run in runs:
        steps, alarms = column(run.rows, "difficulty/selection_alarm")
        if not len(steps):
            continue
        raised = steps[alarms > 0]
        said = f"no alarm in {len(steps):,} steps"
        if len(raised):
            said = f"ALARM in {len(raised):,} of {len(steps):,} steps, first in step {raised[0]:.0f}"
        kind = "alarm" if len(raised) else "note"
        parts.append(f'<p class="{kind}">{escape(run.name)}: selection bias: {said}.</p>')
    return "".join(parts)


# ---------------------------------------------------------------- totals


def _totals(runs: Sequence[RunFacts]) -> str:
    head = "<tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr>"
    body = "".join(
        f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{escape(tell(run))}</td>" for run in runs) + "</tr>"
        for label, tell in TOTALS
    )
    return f'<table class="totals">{head}{body}</table>{_differences(runs)}'


def _differences(runs: Sequence[RunFacts]) -> str:
    if len(runs) < 2:
        return ""
    names = sorted(set().union(*(run.settings for run in runs)))
    rows = []
    for name in names:
        values = [str(run.settings.get(name, "not set")) for run in runs]
        if len(set(values)) > 1:
            rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>")
    head = "<tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr>"
    return f"<h3>Settings that differ</h3><table>{head}{''.join(rows)}</table>" if rows else "<p>Same settings.</p>"


def _from_to(rows: Sequence[dict], name: str) -> str:
    _, values = column(rows, name)
    return f"{number(values[0])} → {number(values[-1])}" if len(values) else "-"


def _steps(run: RunFacts) -> str:
    return f"{len(run.rows):,} of {run.setting('learner.steps', '?')}"


def _accuracy(run: RunFacts) -> str:
    return _from_to(run.evaluations, "eval/accuracy")


def _reward(run: RunFacts) -> str:
    return _from_to(run.rows, "reward/mean")


def _wall_time(run: RunFacts) -> str:
    return duration(float(run.rows[-1].get("time_s") or 0.0))


def _throughput(run: RunFacts) -> str:
    rates = (column(run.rows, f"{role}/tokens_per_s")[1] for role in ("rollout", "learner"))
    return " / ".join(number(float(sorted(rate.tolist())[len(rate) // 2])) if len(rate) else "-" for rate in rates)


def _waits(run: RunFacts) -> str:
    share = wait_share(Figures(run.rows, run.settings).steady)
    return "-" if share is None else f"{share:.0%}"


def _lag(run: RunFacts) -> str:
    (_, largest), (_, mean) = (column(run.rows, f"staleness/{name}_versions") for name in ("max", "mean"))
    if not len(largest) or not len(mean):
        return "-"
    return f"at most {largest.max():.0f}, mean {mean.mean():.2f} (allowed {run.setting('max_staleness', '?')})"


def _groups(fate: str) -> Callable[[RunFacts], str]:
    return lambda run: f"{run.rows[-1].get(f'ledger/{fate}_groups') or 0:,.0f}"


TOTALS: tuple[tuple[str, Callable[[RunFacts], str]], ...] = (
    ("steps", _steps),
    ("accuracy", _accuracy),
    ("reward", _reward),
    ("time", _wall_time),
    ("tokens/s, rollout / learner (medians)", _throughput),
    ("learner waits for rollouts", _waits),
    ("lag, versions", _lag),
    *((f"groups {fate}" if fate != "expired" else "leases expired", _groups(fate)) for fate in FATES),
)
