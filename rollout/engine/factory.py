"""From a configuration to its engine; nothing heavy is imported before it is needed."""

from collections.abc import Callable

from rollout.config import RolloutConfig
from rollout.engine.base import Engine


def make_engine(config: RolloutConfig, model: str, seed: int, version: int) -> Engine:
    """The engine that `config.engine` names, not started yet.

    model: a folder or hub id. version: the policy version of the weights that lie there.
    """
    engine = ENGINES[config.engine](config, model, seed, version)
    if config.reasoning.thinking_tokens == 0:
        return engine
    from rollout.engine.reasoning import ReasoningEngine

    return ReasoningEngine(engine, config, model)


def _small(config: RolloutConfig, model: str, seed: int, version: int) -> Engine:
    from rollout.engine.small_engine import SmallEngine

    return SmallEngine(config, model, seed, version)


def _vllm(config: RolloutConfig, model: str, seed: int, version: int) -> Engine:
    from rollout.engine.vllm_engine import VllmEngine

    return VllmEngine(config, model, seed, version)


ENGINES: dict[str, Callable[[RolloutConfig, str, int, int], Engine]] = {"small": _small, "vllm": _vllm}
