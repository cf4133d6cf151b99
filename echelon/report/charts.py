"""Which charts a report has, and of which figures; runs that are compared lie in one chart where they can."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from databus.codec import Array
from databus.staleness import LAG_BUCKETS
from echelon.report.journal_facts import FATES
from echelon.report.run_facts import RunFacts
from echelon.report.series import Series, binned, column
from echelon.report.svg import Line, bar_chart, heat_map, line_chart, stacked_chart

Runs = Sequence[RunFacts]
LAGS = tuple(LAG_BUCKETS)
MAX_PARTS = 6
"""Of a composed reward, that one chart can tell apart."""
DRAFT_LAGS = (0, 1, 2, 4, 8, 16)
"""Least age, in versions, of each class of draft tokens (`rollout.drafting.counters.LAGS`)."""
DRAFT_SOURCES = ("own", "sibling", "epoch", "common")


def reward_charts(runs: Runs) -> list[str]:
    parts = sorted({name for run in runs for name in run.rows[-1] if name.startswith("reward/")} | {"reward/mean"})
    parts.remove("reward/mean")
    shown = ["reward/mean", *(parts if len(parts) > 1 else ())][:MAX_PARTS]
    return _some(
        line_chart("Reward", "mean of a batch's completions", _lines(runs, shown)),
        line_chart("Accuracy on held-out problems", "share solved, greedy", _accuracy(runs), "policy version"),
        line_chart("Completion length", "tokens", _lines(runs, ["rollout/length_mean", "rollout/length_max"])),
        line_chart("Truncated completions", "share", _lines(runs, ["rollout/truncated_fraction"])),
    )


def staleness_charts(runs: Runs) -> list[str]:
    names = ["staleness/mean_versions", "staleness/max_versions"]
    histograms = [_lag_histogram(run, _of(run, runs)) for run in runs]
    return _some(*histograms, line_chart("Lag of trained tokens", "versions", _lines(runs, names)))


def _lag_histogram(run: RunFacts, name: str) -> str:
    rows = [row for row in run.rows if any(f"staleness/lag{lag}_share" in row for lag in LAGS)]
    if not rows:
        return ""
    steps = np.array([row["step"] for row in rows], np.float64)
    shares: list[tuple[str, Array]] = []
    series: Series | None = None
    for lag in LAGS:
        values = np.array([row.get(f"staleness/lag{lag}_share") or 0.0 for row in rows])
        series = binned(steps, values)
        if values.any():
            shares.append((f"lag {_lag_label(lag)}", series.mean))
    assert series is not None
    return stacked_chart(
        f"Staleness histogram by step{name}", "share of trained tokens", series.x, shares, series.per_bin
    )


def speed_charts(runs: Runs) -> list[str]:
    return _some(
        line_chart("Where the learner's time goes", "s a step", _lines(runs, ["learner/step_s", "learner/wait_s"])),
        line_chart("Throughput", "tokens/s", _lines(runs, ["rollout/tokens_per_s", "learner/tokens_per_s"])),
        line_chart("Groups that wait for a batch", "groups", _lines(runs, ["bus/queued_groups"])),
        line_chart("New weights", "s, the slowest worker", _lines(runs, ["weights/sync_s", "weights/pause_s"])),
    )


def length_charts(runs: Runs) -> list[str]:
    names = ["difficulty/length_predicted", "difficulty/length_actual"]
    error = line_chart(
        "Error of predicted lengths", "share of the mean length", _lines(runs, ["difficulty/length_error_ratio"])
    )
    maps = [part for run in runs for part in _length_maps(run, _of(run, runs))]
    return _some(line_chart("Length, predicted and found", "tokens", _lines(runs, names)), error, *maps)


def _length_maps(run: RunFacts, name: str) -> Iterator[str]:
    outcomes = () if run.journal is None else run.journal.outcomes
    table = np.array([(each.predicted, each.length, each.reward) for each in outcomes], np.float64).reshape(-1, 3)
    known = table[table[:, 0] > 0]
    yield heat_map(
        f"Length against predicted length{name}", "predicted tokens", "mean tokens of a group", known[:, 0], known[:, 1]
    )
    yield heat_map(
        f"Length against difficulty{name}", "mean reward of a group", "mean tokens of a group", table[:, 2], table[:, 1]
    )


def draft_charts(runs: Runs) -> list[str]:
    if not any(row.get("draft/acceptance") for run in runs for row in run.rows):
        return []
    charts = [
        line_chart("Draft tokens accepted", "tokens a verification", _lines(runs, ["draft/accepted_per_round"])),
        line_chart("Draft acceptance", "share of drafted tokens", _lines(runs, ["draft/acceptance"])),
    ]
    for run in runs:
        name = _of(run, runs)
        lags = [f"draft/acceptance_lag{lag}" for lag in DRAFT_LAGS]
        sources = [f"draft/acceptance_{source}" for source in DRAFT_SOURCES]
        charts += [
            _by_epoch(run, name),
            line_chart(f"Draft acceptance by source{name}", "share of drafted tokens", _lines([run], sources)),
            line_chart(f"Draft acceptance by age{name}", "share of drafted tokens", _lines([run], lags)),
        ]
    return _some(*charts)


def _by_epoch(run: RunFacts, name: str) -> str:
    """A step belongs to the epoch that its batch's groups came to."""
    if not run.num_prompts:
        return ""
    batch = run.setting("batch_groups", 0)
    rows = [row for row in run.rows if "draft/acceptance" in row]
    epochs = np.array([row.get("ledger/trained_groups", batch * row["step"]) - 1 for row in rows]) // run.num_prompts
    values = np.array([row["draft/acceptance"] or 0.0 for row in rows])
    present = np.unique(epochs)
    means = [float(values[epochs == epoch].mean()) for epoch in present]
    labels = [f"{max(0, epoch) + 1:.0f}" for epoch in present]
    return bar_chart(
        f"Draft acceptance by epoch{name}", "share of drafted tokens", labels, [("acceptance", means)], "epoch"
    )


def mismatch_charts(runs: Runs) -> list[str]:
    charts = [
        line_chart("Mismatch", "KL, nats a token", _lines(runs, ["mismatch/kl", "mismatch/kl_lag0"])),
        line_chart("Effective sample size", "share of the batch", _lines(runs, ["mismatch/ess"])),
        line_chart("Clipped and truncated", "share of tokens", _lines(runs, CLIPPED)),
        line_chart("Gradient norm", "before clipping", _lines(runs, ["learner/grad_norm"])),
        line_chart("Policy loss", "loss", _lines(runs, ["loss/policy"]), zero=False),
        line_chart("Entropy", "nats a token", _lines(runs, ["loss/entropy"])),
    ]
    for title, unit, name in BY_LAG:
        bars = [(run.name, [_mean(run, f"{name}_lag{lag}") for lag in LAGS]) for run in runs]
        labels = [_lag_label(lag) for lag in LAGS]
        charts.append(
            bar_chart(f"{title} by lag", unit, labels, bars, "lag of the completion's oldest token, versions")
        )
    return _some(*charts)


CLIPPED = ["loss/clip_fraction", "loss/importance_truncated_fraction"]
BY_LAG = (
    ("Mismatch", "KL, nats a token", "mismatch/kl"),
    ("Effective sample size", "share", "mismatch/ess"),
    ("Clip fraction", "share of tokens", "loss/clip_fraction"),
)


def selection_charts(runs: Runs) -> list[str]:
    charts = [
        line_chart(f"{what}: dispatched and trained", unit, _lines(runs, [f"difficulty/{name}_{end}" for end in ENDS]))
        for what, unit, name in (("Length", "tokens", "length"), ("Pass rate", "share", "pass_rate"))
    ]
    z = line_chart("Selection bias", "standard errors; the alarm is above 4", _lines(runs, ["difficulty/selection_z"]))
    for run in runs:
        charts += _fates(run, _of(run, runs))
    return _some(*charts, z)


ENDS = ("dispatched", "trained")


def _fates(run: RunFacts, name: str) -> Iterator[str]:
    """By what became of them, and by who generated them."""
    outcomes = () if run.journal is None else run.journal.outcomes
    if not outcomes:
        return
    fates = [fate for fate in FATES if any(each.fate == fate for each in outcomes)]
    by_fate = {fate: [each for each in outcomes if each.fate == fate] for fate in fates}
    for what, unit, value in FATE_CHARTS:
        means = [float(np.mean([value(each) for each in by_fate[fate]])) for fate in fates]
        labels = [f"{fate} ({len(by_fate[fate]):,})" for fate in fates]
        yield bar_chart(f"{what} by what became of the group{name}", unit, labels, [(what, means)], "fate (groups)")
    workers = sorted({each.worker for each in outcomes if each.worker})
    if 1 < len(workers) <= MAX_SOURCES:
        counts = [
            (fate, [float(sum(each.worker == worker for each in by_fate[fate])) for worker in workers])
            for fate in fates
        ]
        yield bar_chart(f"Groups by source{name}", "groups", workers, counts, "worker")


MAX_SOURCES = 12
"""Workers that find room in one bar chart."""
FATE_CHARTS: tuple[tuple[str, str, Callable], ...] = (
    ("Length", "tokens of a completion", lambda outcome: outcome.length),
    ("Reward", "mean of a group", lambda outcome: outcome.reward),
)


# ---------------------------------------------------------------- parts


def _lines(runs: Runs, names: Sequence[str]) -> list[Line]:
    """One run: a colour a name. Several: a colour a run, the second name of each dashed, further ones left out."""
    lines = []
    for place, run in enumerate(runs):
        for index, name in enumerate(names if len(runs) == 1 else names[:2]):
            label = _label(name, names)
            colour = index if len(runs) == 1 else place
            shown = label if len(runs) == 1 else f"{run.name}: {label}"
            lines.append(Line(shown, binned(*column(run.rows, name)), colour, len(runs) > 1 and index == 1))
    return lines


def _label(name: str, names: Sequence[str]) -> str:
    """Without its area, unless another one has the same name."""
    area, _, own = name.partition("/")
    is_shared = sum(other.partition("/")[2] == own for other in names) > 1
    return f"{area} {own}".replace("_", " ") if is_shared else own.replace("_", " ")


def _accuracy(runs: Runs) -> list[Line]:
    names = [(run, "accuracy" if len(runs) == 1 else run.name) for run in runs]
    return [Line(label, binned(*column(run.evaluations, "eval/accuracy")), i) for i, (run, label) in enumerate(names)]


def _mean(run: RunFacts, name: str) -> float:
    _, values = column(run.rows, name)
    return float(values.mean()) if len(values) else float("nan")


def _lag_label(lag: str) -> str:
    return lag.replace("to", "-").replace("plus", "+")


def _of(run: RunFacts, runs: Runs) -> str:
    return f": {run.name}" if len(runs) > 1 else ""


def _some(*charts: str) -> list[str]:
    return [chart for chart in charts if chart]
