"""From what a run has left behind to what everything costs."""

import os
import statistics
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from echelon.config import RunConfig
from echelon.plan.contention import Contention
from echelon.plan.costs import Costs
from echelon.plan.engine_fit import EngineFit
from echelon.plan.trace import LearnerStep, Trace

FIRST_STEPS = 1
"""Not counted: a learner's first step allocates, compiles and reads what later ones find in place."""


def stated_costs(config: RunConfig) -> Costs:
    """Where there is no run to fit to. Roles of one machine's processors share them; those on GPUs have their own."""
    lengths = min(Costs().length_mean, config.rollout.max_tokens / 2)
    costs = replace(Costs(), length_mean=lengths, tokens_per_step=1.0)
    if config.rollout.device == "cpu" and config.learner.device == "cpu":
        # A vLLM engine on a processor has a thread that computes, and processes that schedule and detokenise beside it.
        return replace(costs, cores=float(os.cpu_count() or 1), worker_cores=1.25, learner_cores=1.0)
    return costs


def fit_costs(config: RunConfig, trace: Trace, costs: Costs) -> Costs:
    """Means, not medians: what is foretold is how far a run comes, and that has its bad moments in it.

    Args: config: of the run. costs: what is not fitted: cores, and what roles take of them, among that.
    """
    shared = Contention(trace, costs)
    rows = [row for row in trace.rows if row["step"] >= FIRST_STEPS] or trace.rows
    updates = [row for row in rows if row.get("weights/sync_s", 0.0) > 0]
    sync_s = _mean([row["weights/sync_s"] for row in updates])
    costs = replace(
        costs,
        publish_s=_mean([row.get("learner/publish_s", 0.0) for row in rows]),
        sync_s=sync_s,
        pause_s=min(sync_s, _mean([row["weights/pause_s"] for row in updates])),
        score_s=_mean([group.score_s for group in trace.groups]),
        tokens_per_step=1.0 + _mean([row.get("draft/accepted_per_round", 0.0) for row in rows]),
    )
    train_s, train_token_s = fit_learner(trace.steps, shared, costs.publish_s)
    speed = EngineFit(config, trace, costs, shared).solve()
    return replace(
        costs, train_s=train_s, train_token_s=train_token_s, step_s=speed.step_s, sequence_s=speed.sequence_s
    )


def fit_learner(steps: Sequence[LearnerStep], shared: Contention, publish_s: float) -> tuple[float, float]:
    """(seconds of a step in itself, seconds a token), undisturbed: the slope by Theil and Sen, the mean of the rest.

    Batches of a run are nearly alike, and the slope may be mostly noise: at least half of a step is taken to be by
    tokens.
    """
    counted = [step for step in steps if step.step >= FIRST_STEPS] or list(steps)
    work = np.diff(shared.work(np.array([(step.cut, step.taken) for step in counted])), axis=1)[:, 0]
    work = np.maximum(1e-6, work - publish_s)
    tokens = np.array([max(1, step.tokens) for step in counted], float)
    first, second = np.triu_indices(len(tokens), 1)
    apart = tokens[first] != tokens[second]
    slopes = ((work[first] - work[second])[apart] / (tokens[first] - tokens[second])[apart]) if apart.any() else [0.0]
    most = float(work.sum() / tokens.sum())
    slope = float(np.clip(np.median(slopes), most / 2, most))
    return max(0.0, float(np.mean(work - slope * tokens))), slope


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
