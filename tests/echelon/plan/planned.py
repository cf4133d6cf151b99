"""Runs to simulate: a tiny recipe, and costs that one can reckon with by hand."""

from databus.config import StalePolicy
from echelon.config import DataConfig, EvalConfig, RunConfig
from echelon.plan.costs import Costs
from learner.config import LearnerConfig
from rollout.config import RolloutConfig

BY_HAND = Costs(
    step_s=0.1,
    sequence_s=0.0,
    score_s=0.0,
    train_s=6.0,
    train_token_s=0.0,
    publish_s=0.0,
    sync_s=0.0,
    pause_s=0.0,
    bus_s=0.0,
    length_mean=100.0,
    length_spread=0.0,
    problems=50,
)
"""100 tokens a completion at 0.1 s each: 10 s to generate anything. 6 s to train a batch. All else is free."""


def make_config(
    *,
    workers: int = 1,
    max_staleness: int = 0,
    batch_groups: int = 4,
    group_size: int = 2,
    max_sequences: int = 64,
    stale_policy: StalePolicy = "drop",
    eval_every: int = 0,
    ahead: float = 1.0,
) -> RunConfig:
    return RunConfig(
        model="none",
        data=DataConfig(train="none"),
        max_staleness=max_staleness,
        stale_policy=stale_policy,
        batch_groups=batch_groups,
        group_size=group_size,
        rollout=RolloutConfig(
            workers=workers, max_sequences=max_sequences, ahead=ahead, context_tokens=2048, max_tokens=1000
        ),
        learner=LearnerConfig(steps=100),
        eval=EvalConfig(every=eval_every),
    )
