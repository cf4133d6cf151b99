"""From a configuration to its engine; nothing heavy is imported before it is needed."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path

from rollout.config import DraftConfig, RolloutConfig
from rollout.engine.base import Engine

logger = logging.getLogger(__name__)


def make_engine(
    config: RolloutConfig,
    model: str,
    seed: int,
    version: int,
    draft: DraftConfig = DraftConfig(),  # noqa: B008
    turns: Path | None = None,
) -> Engine:
    """The engine that `config.engine` names, not started yet.

    model: a folder or hub id. version: the policy version of the weights that lie there. turns: folder of the flags
    where it takes turns with the learner on a device: it may be put to sleep.
    """
    engine = ENGINES[config.engine](config, model, seed, version, draft, turns)
    if config.reasoning.thinking_tokens == 0:
        return engine
    from rollout.engine.reasoning import ReasoningEngine

    return ReasoningEngine(engine, config, model)


def import_engine(name: str) -> None:
    """What its imports take, which is seconds, can be had before there is anything to start."""
    importlib.import_module(f"rollout.engine.{name}_engine")


def _small(
    config: RolloutConfig, model: str, seed: int, version: int, draft: DraftConfig, turns: Path | None
) -> Engine:
    from rollout.engine.small_engine import SmallEngine

    if draft.policy != "off":
        logger.info("draft.policy=%s is ignored: rollout.engine=small does not draft", draft.policy)

    return SmallEngine(config, model, seed, version)


def _vllm(config: RolloutConfig, model: str, seed: int, version: int, draft: DraftConfig, turns: Path | None) -> Engine:
    from rollout.engine.vllm_engine import VllmEngine

    return VllmEngine(config, model, seed, version, draft, turns)


MakeEngine = Callable[[RolloutConfig, str, int, int, DraftConfig, Path | None], Engine]
ENGINES: dict[str, MakeEngine] = {"small": _small, "vllm": _vllm}
