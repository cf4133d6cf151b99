"""Many runs that might be, and which of them to choose."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from msgspec.structs import replace

from echelon.config import RunConfig
from echelon.plan.costs import Costs
from echelon.plan.simulation import Outcome, simulate
from echelon.plan.workload import Workload

ENOUGH = 0.95
"""Of the best throughput: what is to be had beyond is less than a prediction is worth."""
WAITS = 0.1
"""A share of idle time from which on a side counts as waiting."""
BROKER_GROUPS_PER_S = 9000.0
"""What a broker takes with a journal and encryption (benchmarks/results/bench_bus.json has more; this is its floor)."""


@dataclass(frozen=True)
class Cell:
    """Settings that were tried, and what they came to."""

    workers: int
    max_staleness: int
    batch_groups: int
    outcome: Outcome

    @property
    def name(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{workers}, max_staleness={self.max_staleness}, batch_groups={self.batch_groups}"


def cells(
    config: RunConfig,
    costs: Costs,
    workload: Callable[[], Workload],
    *,
    workers: Sequence[int],
    staleness: Sequence[int],
    batches: Sequence[int],
    steps: int,
) -> Iterator[Cell]:
    """Each combination in turn, all with the same luck. Args: workload: makes one that begins its draws anew."""
    for batch, num_workers, bound in product(batches, workers, staleness):
        tried = replace(
            config,
            max_staleness=bound,
            batch_groups=batch,
            rollout=replace(config.rollout, workers=num_workers),
        )
        yield Cell(num_workers, bound, batch, simulate(tried, costs, workload(), steps=steps))


def recommend(tried: Sequence[Cell], batch_groups: int) -> tuple[Cell | None, str]:
    """The fewest workers, then the least staleness, that come within a few percent of the most tokens a second.

    Args: batch_groups: the recipe's. What a batch teaches depends on its size, so that no other is recommended where
        this one was tried.
    Returns: None where every run would fail; and a sentence.
    """
    good = [cell for cell in tried if not cell.outcome.failure]
    if not good:
        return None, f"every one of these runs would end early: {tried[0].outcome.failure}"
    of_recipe = [cell for cell in good if cell.batch_groups == batch_groups] or good
    best = max(of_recipe, key=lambda cell: cell.outcome.tokens_per_s)
    enough = [cell for cell in of_recipe if cell.outcome.tokens_per_s >= ENOUGH * best.outcome.tokens_per_s]
    chosen = min(enough, key=lambda cell: (cell.workers, cell.max_staleness, -cell.outcome.tokens_per_s))
    return chosen, _why(chosen, best)


def _why(chosen: Cell, best: Cell) -> str:
    share = chosen.outcome.tokens_per_s / best.outcome.tokens_per_s
    than = "the most of all that were tried" if chosen is best else f"{share:.0%} of the most ({best.name})"
    return (
        f"{chosen.name}: {chosen.outcome.tokens_per_s:,.0f} trained tokens/s, {than}, with the fewest workers and then "
        f"the least staleness that give it; {_limit(chosen.outcome)}"
    )


def _limit(outcome: Outcome) -> str:
    learner, workers = f"{outcome.learner_idle:.0%}", f"{outcome.worker_idle:.0%}"
    if outcome.groups_per_s > BROKER_GROUPS_PER_S:
        return f"but {outcome.groups_per_s:,.0f} groups/s are more than a broker is known to take"
    if outcome.learner_idle < WAITS and outcome.worker_idle < WAITS:
        return f"both sides are busy (the learner waits {learner}, workers {workers})"
    if outcome.learner_idle < WAITS:
        return f"the learner is the limit (it waits {learner} of the time, workers {workers})"
    if outcome.worker_idle < WAITS:
        return f"generation is the limit (the learner waits {learner} of the time, workers {workers})"
    return f"the staleness bound is the limit: they wait for each other (the learner {learner}, workers {workers})"
