"""A plan for a person: what was tried, what came out, what was taken for granted."""

from collections.abc import Sequence

from msgspec.structs import asdict
from rich import box
from rich.table import Table

from echelon.plan.costs import Costs
from echelon.plan.grid import Cell

HEADS = (
    "workers",
    "max_staleness",
    "batch_groups",
    "tokens/s",
    "steps/s",
    "learner idle",
    "workers idle",
    "lag mean",
    "lag max",
    "dropped",
)


def plan_table(tried: Sequence[Cell], chosen: Cell | None, title: str) -> Table:
    table = Table(title=title, box=box.ROUNDED, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for cell in tried:
        table.add_row(*_texts(cell), style="bold" if cell is chosen else "")
    return table


def _texts(cell: Cell) -> list[str]:
    outcome = cell.outcome
    settings = [str(cell.workers), str(cell.max_staleness), str(cell.batch_groups)]
    if outcome.failure:
        return [*settings, "would end", *["-"] * (len(HEADS) - len(settings) - 1)]
    return [
        *settings,
        f"{outcome.tokens_per_s:,.0f}",
        f"{outcome.steps_per_s:.3g}",
        f"{outcome.learner_idle:.0%}",
        f"{outcome.worker_idle:.0%}",
        f"{outcome.staleness_mean:.2f}",
        f"{outcome.staleness_max:.0f}",
        f"{outcome.dropped:.1%}",
    ]


def assumptions(costs: Costs, names: Sequence[str]) -> str:
    """`assume.step_s=0.012 …`: what of the costs these names have, as it can be given again."""
    values = asdict(costs)
    return " ".join(f"assume.{name}={values[name]:.4g}" for name in names)
