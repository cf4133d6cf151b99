"""From a recipe script and its overrides to the configuration of a run."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from databus.config import BusConfig
from echelon.config import RunConfig
from echelon.overrides import apply_overrides
from echelon.settings import to_config
from echelon.validate import validate
from learner.checks import ADVANTAGE_SETTING, names_function
from rewards.python_file import describe, import_file
from rewards.resolve import REWARD_SETTING, split_reference, with_references
from rollout.config import RolloutConfig, why_not_sampling
from rollout.environments.resolve import ENVIRONMENT_SETTING, check_reference, is_file

RECIPE_FILE = "recipe.py"
"""The name of the recipe's copy in a run folder; a reward that it defines is referred to by that name."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was resolved: its file and the configuration, with overrides, checked."""

    path: Path
    config: RunConfig

    @property
    def name(self) -> str:
        return self.path.stem


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Run the script's `recipe()`, apply the overrides, check all settings, make paths absolute.

    Raises: ValueError, in one line naming the file and the key.
    """
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py":
        raise ValueError(f"{path} is not a recipe: expected a Python script, such as recipes/grpo_chain_sum.py")
    if not file.is_file():
        raise ValueError(f"no such recipe: {path}")
    config = apply_overrides(_checked(_call_recipe(file), file), overrides)
    config = _with_absolute_paths(config, file)
    validate(config)
    return Recipe(path=file, config=config)


def _call_recipe(file: Path) -> Any:
    module = import_file(file)
    del sys.modules[module.__name__]
    function: Callable[[], Any] | None = getattr(module, "recipe", None)
    if not callable(function):
        raise ValueError(f"{file} has no function recipe(): it must return the run's RunConfig")
    try:
        return function()
    except (Exception, SystemExit) as error:
        why = why_not_sampling(str(error))
        raise ValueError(f"{file}: recipe() failed: {describe(error, file)}{why}") from error


def _checked(returned: Any, file: Path) -> RunConfig:
    """msgspec checks types and bounds only when it decodes, so what a recipe built goes round once."""
    if not isinstance(returned, RunConfig):
        raise ValueError(f"{file}: recipe() returned {type(returned).__name__}, expected RunConfig")
    try:
        values = msgspec.to_builtins(returned, enc_hook=_path_as_text)
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from None
    return to_config(values, str(file))


def _path_as_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise TypeError(f"a setting is a {type(value).__name__}, which no setting can be")


def _with_absolute_paths(config: RunConfig, file: Path) -> RunConfig:
    """What exists on this disk is named absolutely: roles, workers and `echelon export` may start elsewhere."""
    data = msgspec.structs.replace(config.data, train=_absolute(config.data.train), eval=_absolute(config.data.eval))
    reward = with_references(config.reward, lambda reference: _function_reference(reference, file, REWARD_SETTING))
    if reward.judge.cache:
        cache = str(Path(reward.judge.cache).expanduser().resolve())
        reward = msgspec.structs.replace(reward, judge=msgspec.structs.replace(reward.judge, cache=cache))
    advantage = config.learner.advantage
    if names_function(advantage.estimator):
        estimator = _function_reference(advantage.estimator, file, ADVANTAGE_SETTING)
        advantage = msgspec.structs.replace(advantage, estimator=estimator)
    return msgspec.structs.replace(
        config,
        model=_absolute(config.model),
        data=data,
        reward=reward,
        rollout=_with_absolute_environment(config.rollout, file),
        learner=msgspec.structs.replace(config.learner, advantage=advantage),
        bus=_with_absolute_keys(config.bus),
    )


def _with_absolute_environment(rollout: RolloutConfig, file: Path) -> RolloutConfig:
    environment = rollout.environment
    check_reference(environment.name)
    if not is_file(environment.name):
        return rollout
    name = _function_reference(environment.name, file, ENVIRONMENT_SETTING)
    return msgspec.structs.replace(rollout, environment=msgspec.structs.replace(environment, name=name))


def _with_absolute_keys(bus: BusConfig) -> BusConfig:
    """ "auto" is a word, anything else a folder."""
    return bus if bus.keys == "auto" else msgspec.structs.replace(bus, keys=str(Path(bus.keys).expanduser().resolve()))


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if text and path.exists() else text


def _function_reference(reference: str, recipe: Path, setting: str) -> str:
    """The recipe's own functions are found in the run's copy of it, others where they lie beside the recipe."""
    path, name = split_reference(reference, recipe.parent, setting)
    return f"{RECIPE_FILE}:{name}" if path == recipe else f"{path}:{name}"
