"""What the broker of a run is told of its configuration; `echelon plan` tells it the same."""

from databus.config import BrokerConfig, HistoryConfig
from databus.prompts import GroupFilter
from echelon.config import RunConfig
from rollout.config import DraftConfig
from rollout.scheduling.filters import ZeroVarianceFilter


def broker_settings(
    config: RunConfig,
    *,
    run_id: str,
    address: str,
    start_step: int = 0,
    config_json: bytes = b"",
    run_dir: str = "",
) -> BrokerConfig:
    return BrokerConfig(
        run_id=run_id,
        address=address,
        steps=config.learner.steps,
        start_step=start_step,
        group_size=config.group_size,
        batch_groups=config.batch_groups,
        max_staleness=config.max_staleness,
        stale_policy=config.stale_policy,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        eval_every=config.eval.every,
        eval_max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
        eval_timeout_s=config.eval.timeout_s,
        eval_threshold=config.eval.threshold,
        max_reward_failures=config.reward.max_failures,
        bus=config.bus,
        config_json=config_json,
        run_dir=run_dir,
        max_filtered=config.scheduling.max_filtered,
        history=history_config(config.draft),
        keep_journal=config.journal.keep,
    )


def history_config(draft: DraftConfig) -> HistoryConfig | None:
    """None where nobody drafts."""
    if draft.policy == "off":
        return None
    return HistoryConfig(
        tokens=draft.history_tokens, window_versions=draft.window_versions, total_tokens=draft.index_tokens
    )


def group_filters(config: RunConfig) -> list[GroupFilter]:
    """What keeps a completed group out of every batch."""
    return [ZeroVarianceFilter()] if config.scheduling.drop_zero_variance else []
