"""Advice: pure functions from a run's figures to a sentence that names the figure and the setting to change."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from databus.slowness import MIN_WORKERS, median_of_others
from echelon.report.series import column

WARM_UP_STEPS = 3
"""Left out of averages of a run with more than twice as many: engines compile, and nothing is queued yet."""
MIN_STEPS = 4
"""Fewer tell nothing."""
WAIT_SHARE = 0.25
"""Of the learner's time: below, the two sides are as even as bursts of long completions let them be."""
AHEAD_WAIT_SHARE = 0.05
"""A learner that waits less than this has always a batch ready."""
AHEAD_BATCHES = 0.75
"""Batches that wait all the time: work done early only grows old."""
WORKER_IDLE_SHARE = 0.25
STALE_SHARE = 0.05
"""Groups generated for nothing: a twentieth of all generation is worth a setting."""
FILTERED_SHARE = 0.5
"""DAPO's sampling drops a good part by design; beyond a half it costs more than all training batches."""
FAILED_SHARE = 0.02
ZERO_SHARE = 0.5
"""Groups without any advantage that are trained nevertheless."""
TRUNCATED_SHARE = 0.2
SLOW_FRACTION = 0.5
CLIP_FRACTION = 0.2
"""PPO's runs lie far below; beyond, every fifth token teaches nothing."""
LOW_ESS = 0.5
"""Half of the batch's tokens count for nothing (docs/guide/read-the-metrics.md)."""
KL_LAG0 = {"float32": 1e-3, "bfloat16": 1e-2}
"""Nats a token between the two engines on the same weights: usual are 1e-6 and 1e-3."""
ALARM_SHARE = 0.05
FALL = 0.3
"""Relative: drafts get worse by a third at once where something has happened to the policy."""
FALL_Z = 5.0
"""Standard errors between before and after: what a random walk of steps gives hardly ever."""
FALL_MIN_STEPS = 10
MIN_ACCEPTANCE = 0.1
"""Below, drafting was worth nothing before either."""


@dataclass(frozen=True)
class Figures:
    """What advice is drawn from. rows: of steps that were taken. settings: by dotted name. rates: tokens a second of
    each worker while it has work. worker_idle: mean share of its time in which a worker waits for the learner; None
    where not known.
    """

    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    rates: Mapping[str, float] = field(default_factory=dict)
    worker_idle: float | None = None

    @property
    def steady(self) -> Sequence[Mapping[str, Any]]:
        return self.rows[WARM_UP_STEPS:] if len(self.rows) > 2 * WARM_UP_STEPS else self.rows

    @property
    def late(self) -> Sequence[Mapping[str, Any]]:
        """The last quarter: what holds now."""
        return self.rows[-max(MIN_STEPS, len(self.rows) // 4) :]

    def setting(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)

    @property
    def takes_turns(self) -> bool:
        """One side waits while the other works: that is how it is meant."""
        return self.setting("placement", "separate") == "colocated"

    def total(self, name: str) -> float:
        """A ledger's total, as of the last row."""
        return float(self.rows[-1].get(f"ledger/{name}_groups") or 0.0)


@dataclass(frozen=True)
class Advice:
    """weight: share of the run's time or groups that it is about; more matters more."""

    text: str
    weight: float


def advise(figures: Figures) -> list[Advice]:
    """What could be better, the weightiest first; nothing where a run is too short to tell, or well."""
    if len(figures.rows) < MIN_STEPS:
        return []
    found = [advice for rule in RULES if (advice := rule(figures)) is not None]
    return sorted(found, key=lambda advice: -advice.weight)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    _, values = column(rows, name)
    return float(values.mean()) if len(values) else None


def wait_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of its time that the learner waits for batches."""
    wait, step = (column(rows, f"learner/{name}_s")[1].sum() for name in ("wait", "step"))
    return float(wait / (wait + step)) if wait + step > 0 else None


def learner_waits(figures: Figures) -> Advice | None:
    share = wait_share(figures.steady)
    if share is None or share < WAIT_SHARE or figures.takes_turns:
        return None
    staleness, workers = figures.setting("max_staleness", "?"), figures.setting("rollout.workers", "?")
    more = f"a worker more (rollout.workers, now {workers})"
    if staleness == 0:
        more = f"max_staleness=1 lets workers go on meanwhile (now 0), else {more}"
    else:
        more += f" or a larger max_staleness (now {staleness})"
    return Advice(f"The learner waits {share:.0%} of its time for rollouts: {more}.", share)


def workers_wait(figures: Figures) -> Advice | None:
    """Only where the learner does not wait: at a small bound the two take turns, which another rule speaks of."""
    share, batch = wait_share(figures.steady), figures.setting("batch_groups", 0)
    if share is None or share >= AHEAD_WAIT_SHARE or figures.takes_turns:
        return None
    if figures.worker_idle is not None and figures.worker_idle >= WORKER_IDLE_SHARE:
        said = f"Workers wait {figures.worker_idle:.0%} of their time for the learner"
        weight = figures.worker_idle
    else:
        _, queued = column(figures.steady, "bus/queued_groups")
        if not batch or not len(queued) or float(np.median(queued)) < AHEAD_BATCHES * batch:
            return None
        median = float(np.median(queued))
        said = f"{median:.0f} groups ({median / batch:.1f} batches) wait for the learner all the time"
        weight = AHEAD_BATCHES * 0.5
    return Advice(
        f"{said}: fewer workers (rollout.workers), or a faster learner (learner.ranks, learner.microbatch_tokens).",
        weight,
    )


def stale_groups(figures: Figures) -> Advice | None:
    stale, trained = figures.total("stale"), figures.total("trained")
    share = stale / max(1.0, stale + trained)
    if share < STALE_SHARE:
        return None
    return Advice(
        f"{share:.0%} of the groups ({stale:.0f}) went stale before they were trained: a larger max_staleness "
        f"(now {figures.setting('max_staleness', '?')}), a smaller rollout.max_sequences or rollout.ahead, or "
        "stale_policy=mask.",
        share,
    )


def filtered_groups(figures: Figures) -> Advice | None:
    filtered, trained = figures.total("filtered"), figures.total("trained")
    share = filtered / max(1.0, filtered + trained)
    if share < FILTERED_SHARE:
        return None
    return Advice(
        f"{share:.0%} of the groups ({filtered:.0f}) were filtered out: problems are too easy or too hard; "
        "scheduling.curriculum.type=pass_rate_band leaves those out before they are generated.",
        share,
    )


def failed_groups(figures: Figures) -> Advice | None:
    failed, trained = figures.total("failed"), figures.total("trained")
    share = failed / max(1.0, failed + trained)
    if share < FAILED_SHARE:
        return None
    return Advice(
        f"{share:.0%} of the groups ({failed:.0f}) failed in the reward or the engine: logs/broker.log says why; where "
        "rewards take long, raise reward.timeout_s.",
        share,
    )


def nothing_to_learn(figures: Figures) -> Advice | None:
    share = _mean(figures.late, "advantage/zero_groups_fraction")
    if share is None or share < ZERO_SHARE or figures.setting("scheduling.drop_zero_variance", False):
        return None
    return Advice(
        f"{share:.0%} of the groups trained of late have equal rewards, and teach nothing: "
        "scheduling.drop_zero_variance=true replaces them, scheduling.curriculum.type=pass_rate_band avoids them.",
        share,
    )


def truncated(figures: Figures) -> Advice | None:
    share = _mean(figures.late, "rollout/truncated_fraction")
    if share is None or share < TRUNCATED_SHARE:
        return None
    return Advice(
        f"{share:.0%} of the completions end for want of room: raise rollout.max_tokens "
        f"(now {figures.setting('rollout.max_tokens', '?')}), or learner.advantage.mask_truncated=true.",
        share,
    )


def slow_workers(figures: Figures) -> Advice | None:
    rates = {name: rate for name, rate in figures.rates.items() if rate > 0}
    if len(rates) < MIN_WORKERS:
        return None
    slow = sorted(name for name in rates if rates[name] <= SLOW_FRACTION * median_of_others(rates, name))
    if not slow:
        return None
    median = statistics.median(rates.values())
    who = f"{', '.join(slow[:3])}{' and others' if len(slow) > 3 else ''}"
    verb = "are" if len(slow) > 1 else "is"
    return Advice(
        f"{who} {verb} at {max(rates[name] for name in slow) / median:.0%} of the median speed or less "
        f"({median:,.0f} tokens/s): look at the machine; bus.slow_fraction (now "
        f"{figures.setting('bus.slow_fraction', '?')}) sends such workers away.",
        len(slow) / len(rates) * (1 - SLOW_FRACTION),
    )


def refused_versions(figures: Figures) -> Advice | None:
    refused = figures.rows[-1].get("gate/refused_versions") or 0
    if not refused:
        return None
    worst = max(column(figures.rows, "gate/kl")[1], default=0.0)
    return Advice(
        f"Engines refused {refused:.0f} versions (KL up to {worst:.2g} nats a token; rollout.gate.max_kl is "
        f"{figures.setting('rollout.gate.max_kl', '?')}): learner and engine do not compute the same model; look at "
        "rollout.dtype and at learner.dtype first.",
        refused / len(figures.rows) + STALE_SHARE,
    )


def clipping(figures: Figures) -> Advice | None:
    share = _mean(figures.late, "loss/clip_fraction")
    if share is None or share < CLIP_FRACTION:
        return None
    return Advice(
        f"{share:.0%} of the tokens of late are clipped: a smaller learner.lr (now "
        f"{figures.setting('learner.lr', '?')}), a smaller max_staleness, or a wider learner.loss.clip_high.",
        share,
    )


def low_ess(figures: Figures) -> Advice | None:
    ess = _mean(figures.late, "mismatch/ess")
    if ess is None or ess >= LOW_ESS:
        return None
    return Advice(
        f"The effective sample size is {ess:.2f} of the batch of late: a smaller max_staleness (now "
        f"{figures.setting('max_staleness', '?')}), or a smaller learner.lr.",
        1 - ess,
    )


def engines_differ(figures: Figures) -> Advice | None:
    kl = _mean(figures.late, "mismatch/kl_lag0")
    dtype = figures.setting("rollout.dtype", "bfloat16")
    limit = KL_LAG0.get(dtype, max(KL_LAG0.values()))
    if kl is None or kl < limit:
        return None
    return Advice(
        f"Learner and engine differ by {kl:.2g} nats a token on the same weights (usual in {dtype}: below {limit:g}): "
        "set rollout.dtype and learner.dtype alike, and see rollout.gate.max_kl.",
        min(1.0, kl / limit * STALE_SHARE),
    )


def selection_bias(figures: Figures) -> Advice | None:
    _, alarms = column(figures.rows, "difficulty/selection_alarm")
    share = float(alarms.mean()) if len(alarms) else 0.0
    if share < ALARM_SHARE:
        return None
    return Advice(
        f"In {share:.0%} of the steps what was trained differed from what was dispatched: where long groups go stale, "
        "raise max_staleness or lower rollout.ahead; under scheduling.drop_zero_variance some of it is meant.",
        share / 2,
    )


def acceptance_fell(figures: Figures) -> Advice | None:
    """The split with the clearest difference of means, by Welch's z."""
    steps, values = column(figures.rows, "draft/acceptance")
    num = len(values)
    if num < 2 * FALL_MIN_STEPS:
        return None
    splits = np.arange(FALL_MIN_STEPS, num - FALL_MIN_STEPS + 1)
    sums, squares = np.cumsum(values), np.cumsum(values**2)
    before, after = sums[splits - 1] / splits, (sums[-1] - sums[splits - 1]) / (num - splits)
    spread = squares[splits - 1] / splits - before**2, (squares[-1] - squares[splits - 1]) / (num - splits) - after**2
    error = np.sqrt(np.maximum(spread[0], 0) / splits + np.maximum(spread[1], 0) / (num - splits))
    z = (before - after) / np.maximum(error, 1e-6)
    best = int(z.argmax())
    high, low = float(before[best]), float(after[best])
    if z[best] < FALL_Z or high < MIN_ACCEPTANCE or low > (1 - FALL) * high:
        return None
    return Advice(
        f"Acceptance of drafts fell from {high:.0%} to {low:.0%} after version {int(steps[splits[best] - 1])}: drafts "
        f"from old policies do not fit any more; a smaller draft.window_versions (now "
        f"{figures.setting('draft.window_versions', '?')}), or look at what the policy changed.",
        (high - low) / 2,
    )


RULES = (
    learner_waits,
    workers_wait,
    stale_groups,
    filtered_groups,
    failed_groups,
    nothing_to_learn,
    truncated,
    slow_workers,
    refused_versions,
    clipping,
    low_ess,
    engines_differ,
    selection_bias,
    acceptance_fell,
)
