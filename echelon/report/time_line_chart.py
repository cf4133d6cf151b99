"""The time line as a chart: a line a role, shaded by how much of each cell it was at work."""

from html import escape

import numpy as np

from databus.codec import Array
from echelon.report.svg import RIGHT, TOP, Axis, figure, x_ticks
from echelon.report.time_line import REASONS, RoleLine, TimeLine, duration

WIDTH = 1300
"""It has the page's width to itself."""
NAME_WIDTH, LINE, GAP, FOOT = 104, 14, 4, 42
LEVELS = 8
CLASSES = {"busy": "busy", "learner": "bound", "rollouts": "wait", "other": "other", "away": "away"}


def time_line_chart(line: TimeLine, name: str) -> str:
    height = TOP + len(line.roles) * (LINE + GAP) + FOOT
    unit, scale = ("s", 1.0) if line.edges[-1] < 600 else ("min", 60.0) if line.edges[-1] < 36000 else ("h", 3600.0)
    x = Axis(0.0, float(line.edges[-1]) / scale, NAME_WIDTH, WIDTH - RIGHT)
    places = x.at(line.edges / scale)
    drawn = [_role(role, TOP + index * (LINE + GAP), places) for index, role in enumerate(line.roles)]
    drawn.append(x_ticks(x, height - FOOT + 4, f"{unit} since the journal begins"))
    said = "; ".join(f"{role.name}: {role.said}" for role in line.roles)
    present = {reason for role in line.roles for reason, values in role.shares.items() if values.any()}
    legend = [(text, CLASSES[reason]) for reason, text in REASONS.items() if reason in present]
    note = f"A cell is {duration(line.cell_s)}; its shade is the share of it. Point at a name for the role's totals."
    return figure(f"Who worked when: {name}", unit, "".join(drawn), said, legend, note, height, WIDTH)


def _role(role: RoleLine, top: float, places: Array) -> str:
    parts = [
        f'<text class="tick" x="{NAME_WIDTH - 6}" y="{top + LINE - 3}" text-anchor="end">{escape(role.name[-16:])}'
        f"<title>{escape(role.name)}: {escape(role.said)}</title></text>"
    ]
    for reason, shares in role.shares.items():
        levels = np.round(shares * LEVELS).astype(int)
        for level in np.unique(levels[levels > 0]).tolist():
            cells = "".join(_cell(places, index, top) for index in np.flatnonzero(levels == level).tolist())
            parts.append(f'<path class="{CLASSES[reason]} s{level}" d="{cells}"/>')
    return "".join(parts)


def _cell(places: Array, index: int, top: float) -> str:
    width = places[index + 1] - places[index]
    return f"M{places[index]:.1f} {top}h{width:.1f}v{LINE}h-{width:.1f}z"
