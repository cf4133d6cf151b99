"""Charts as SVG: each a figure with a title, units, labelled axes, a legend and a description for screen readers.

Colours are classes (`c0`, `c1`, ... of `page.STYLE`), so that a chart is right in light and in dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import numpy as np

from databus.codec import Array
from echelon.report.series import Series

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 10, 40
NUM_COLOURS = 8
WHOLE = ("step", "policy version")
"""Labels of axes that have whole numbers only."""
_numbers = count()


@dataclass(frozen=True)
class Line:
    """A curve of a chart. colour: index of a class; dashed: for another run in the same colour."""

    label: str
    series: Series
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Values low .. high onto pixels start .. end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, values: Array) -> Array:
        return self.start + (np.asarray(values, np.float64) - self.low) / (self.high - self.low) * (
            self.end - self.start
        )

    def ticks(self, most: int = 6, whole: bool = False) -> list[float]:
        """Round values, at most so many. Args: whole: none between 0 and 1."""
        step = _round_step((self.high - self.low) / most)
        step = max(1.0, step) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Array, start: float, end: float, zero: bool = False) -> Axis:
    """An axis on which all values lie. Args: zero: it begins there where nothing is below."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5) * (not zero), high + (abs(high) * 0.1 or 0.5)
    return Axis(low, high, start, end)


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step * (1 - 1e-9))


def number(value: float) -> str:
    """Short: `12,000`, `0.25`, `1.2e-05`; a million and more as `3.4M`."""
    if value and (abs(value) < 1e-3):
        return f"{value:.1e}"
    for limit, sign in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{sign}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---------------------------------------------------------------- charts


def line_chart(title: str, unit: str, lines: Sequence[Line], x_label: str = "step", zero: bool = True) -> str:
    """Means as curves, smallest to largest as a band around them. "" where no line has a value."""
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return ""
    x = axis(np.concatenate([line.series.x for line in lines]), LEFT, WIDTH - RIGHT)
    edges = [np.concatenate((line.series.low, line.series.high)) for line in lines]
    y = axis(np.concatenate(edges), HEIGHT - BOTTOM, TOP, zero)
    drawn = [_grid(x, y, x_label, unit)]
    for line in lines:
        drawn.append(_curve(line, x, y))
    per_bin = max(line.series.per_bin for line in lines)
    note = (
        f"Each point is the mean of up to {per_bin} steps, the band their smallest to largest." if per_bin > 1 else ""
    )
    said = "; ".join(
        f"{line.label} from {number(line.series.mean[0])} to {number(line.series.mean[-1])}" for line in lines
    )
    legend = [(line.label, f"c{line.colour % NUM_COLOURS}{' dashed' if line.dashed else ''}") for line in lines]
    return figure(title, unit, "".join(drawn), f"{said}, over {x_label}.", legend, note)


def _curve(line: Line, x: Axis, y: Axis) -> str:
    kind = f"c{line.colour % NUM_COLOURS}{' dashed' if line.dashed else ''}"
    xs = x.at(line.series.x)
    if len(line.series) == 1:
        return f'<circle class="dot {kind}" cx="{xs[0]:.1f}" cy="{y.at(line.series.mean)[0]:.1f}" r="3"/>'
    band = ""
    if line.series.per_bin > 1:
        upper, lower = _points(xs, y.at(line.series.high)), _points(xs[::-1], y.at(line.series.low[::-1]))
        band = f'<path class="band {kind}" d="M{upper}L{lower}Z"/>'
    return f'{band}<path class="line {kind}" d="M{_points(xs, y.at(line.series.mean))}"/>'


def _points(xs: Array, ys: Array) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True))


def stacked_chart(
    title: str, unit: str, x_values: Array, shares: Sequence[tuple[str, Array]], per_bin: int, x_label: str = "step"
) -> str:
    """Shares that add up to 1, as areas on each other. Args: x_values: [N]; shares: (label, [N]) from the bottom."""
    if not len(x_values):
        return ""
    if len(x_values) == 1:  # an area has two ends
        x_values = np.array([x_values[0] - 0.5, x_values[0] + 0.5])
        shares = [(label, np.repeat(values, 2)) for label, values in shares]
    x, y = axis(x_values, LEFT, WIDTH - RIGHT), Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    xs, bottom, areas = x.at(x_values), np.zeros(len(x_values)), []
    for index, (_, values) in enumerate(shares):
        top = bottom + values
        upper, lower = _points(xs, y.at(top)), _points(xs[::-1], y.at(bottom[::-1]))
        areas.append(f'<path class="area c{index % NUM_COLOURS}" d="M{upper}L{lower}Z"/>')
        bottom = top
    note = f"Each point is the mean of up to {per_bin} steps." if per_bin > 1 else ""
    said = "; ".join(f"{label} {values.mean():.1%} on average" for label, values in shares) + "."
    legend = [(label, f"c{index % NUM_COLOURS}") for index, (label, _) in enumerate(shares)]
    return figure(title, unit, _grid(x, y, x_label, unit) + "".join(areas), said, legend, note)


def bar_chart(
    title: str, unit: str, labels: Sequence[str], bars: Sequence[tuple[str, Sequence[float]]], x_label: str
) -> str:
    """Bars side by side. Args: bars: (label, a value for each of `labels`); not a number: no bar."""
    values = np.array([each for _, each in bars], np.float64)
    if not labels or not np.isfinite(values).any():
        return ""
    y = axis(values[np.isfinite(values)], HEIGHT - BOTTOM, TOP, zero=True)
    slot = (WIDTH - LEFT - RIGHT) / len(labels)
    width = min(46.0, slot * 0.8 / len(bars))
    zero, every = float(y.at(np.zeros(1))[0]), math.ceil(len(labels) / 12)
    drawn = [_grid(None, y, "", unit), _x_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM, x_label)]
    for place, label in enumerate(labels):
        middle = LEFT + slot * (place + 0.5)
        if place % every == 0:
            drawn.append(f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">')
            drawn.append(f"{escape(label)}</text>")
        for index, value in enumerate(values[:, place].tolist()):
            if math.isfinite(value):
                left, top = middle + (index - len(bars) / 2) * width, float(y.at(np.array([value]))[0])
                drawn.append(
                    f'<rect class="area c{index % NUM_COLOURS}" x="{left:.1f}" y="{min(top, zero):.1f}" '
                    f'width="{width - 1:.1f}" height="{abs(zero - top):.1f}"><title>{escape(label)}, '
                    f"{escape(bars[index][0])}: {number(value)}</title></rect>"
                )
    said = "; ".join(f"{label}: {', '.join(map(number, values[:, place]))}" for place, label in enumerate(labels))
    legend = [(label, f"c{index % NUM_COLOURS}") for index, (label, _) in enumerate(bars)]
    return figure(title, unit, "".join(drawn), said, legend if len(bars) > 1 else [])


def heat_map(title: str, x_label: str, y_label: str, x_values: Array, y_values: Array, bins: int = 28) -> str:
    """How many points lie where. Args: x_values, y_values: [N]."""
    if not len(x_values):
        return ""
    x, y = axis(x_values, LEFT, WIDTH - RIGHT, zero=True), axis(y_values, HEIGHT - BOTTOM, TOP, zero=True)
    ranges = ((x.low, x.high), (y.low, y.high))
    counts, x_edges, y_edges = np.histogram2d(x_values, y_values, bins=bins, range=ranges)
    strength = np.ceil(8 * np.log1p(counts) / np.log1p(counts.max())).astype(int)
    xs, ys = x.at(x_edges), y.at(y_edges)
    cells = []
    for i, j in np.argwhere(counts > 0).tolist():
        cells.append(
            f'<rect class="area c0 s{strength[i, j]}" x="{xs[i]:.1f}" y="{ys[j + 1]:.1f}" '
            f'width="{xs[i + 1] - xs[i]:.1f}" height="{ys[j] - ys[j + 1]:.1f}"><title>{counts[i, j]:.0f} groups'
            "</title></rect>"
        )
    correlation = np.corrcoef(x_values, y_values)[0, 1] if x_values.std() > 0 and y_values.std() > 0 else math.nan
    related = f", correlation {correlation:.2f}" if math.isfinite(correlation) else ""
    note = f"{len(x_values):,} groups{related}; the darker, the more (logarithmic, up to {counts.max():,.0f})."
    drawn = "".join(cells) + _grid(x, y, x_label, y_label)
    return figure(title, y_label, drawn, f"{y_label} against {x_label}: {note}", [], note)


# ---------------------------------------------------------------- parts


def figure(
    title: str,
    unit: str,
    drawn: str,
    said: str,
    legend: Sequence[tuple[str, str]],
    note: str = "",
    height: int = HEIGHT,
    width: int = WIDTH,
) -> str:
    """Args: said: the description. legend: (label, class). note: one line below."""
    name = f"chart{next(_numbers)}"
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{escape(label)}</span>' for label, kind in legend)
    return (
        f'<figure><figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name} {name}d">'
        f'<title id="{name}">{escape(title)}</title><desc id="{name}d">{escape(said)}</desc>{drawn}</svg>'
        f'<div class="legend">{keys}</div>{f"<p class=note>{escape(note)}</p>" if note else ""}</figure>'
    )


def _grid(x: Axis | None, y: Axis, x_label: str, y_label: str) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for value, place in zip(y.ticks(), y.at(np.array(y.ticks())).tolist(), strict=True):
        parts.append(f'<path class="rule" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{number(value)}</text>')
    if x is not None:
        parts.append(x_ticks(x, bottom, x_label, whole=x_label in WHOLE))
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="label" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    return "".join(parts)


def x_ticks(x: Axis, bottom: float, label: str, whole: bool = False) -> str:
    parts = [f'<path class="axis" d="M{x.start} {bottom}H{x.end}"/>']
    for value, place in zip(x.ticks(8), x.at(np.array(x.ticks(8))).tolist(), strict=True):
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v4"/>')
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
        )
    return "".join([*parts, _x_label((x.start + x.end) / 2, bottom, label)])


def _x_label(middle: float, bottom: float, label: str) -> str:
    return f'<text class="label" x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(label)}</text>'
