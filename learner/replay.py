"""Takes recorded steps once more: the learner's own step on a run's own batches; publishes and saves nothing."""

from collections.abc import Callable

import torch.distributed as dist

from learner.batch import BatchFeed
from learner.bus import BrokerLink
from learner.config import LearnerConfig
from learner.run import ClosableBus, LearnerRun, build_train_step, process_group, set_up_torch, start_step_of


def replay_steps(
    config: LearnerConfig,
    run: LearnerRun,
    stop: int,
    bus_factory: Callable[[int], ClosableBus],
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Train from `run.resume_from`, or the initial model, until `stop` steps are taken; one call a rank.

    Args: bus_factory: to who serves the recorded batches; its argument is the first step. on_step: told of each
        step's metrics. Both are called on rank 0 only.
    Raises: ValueError for what a user wrote; RuntimeError for the rest.
    """
    start = start_step_of(config, run)
    set_up_torch(config, run.seed)
    with process_group(config.device, run.collective_timeout_s):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        broker = BrokerLink(bus_factory(start)) if rank == 0 else None
        _, train_step = build_train_step(config, run, start)
        feed = BatchFeed(broker, rank, world_size, run.max_staleness, run.batch_timeout_s)
        for step in range(start, stop):
            metrics = train_step(feed.groups(step), step)
            if rank == 0:
                on_step(step, metrics)
