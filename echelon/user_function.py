"""Functions that a recipe names, for the roles that call them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from echelon.config import RunConfig
from learner.checks import ADVANTAGE_SETTING, names_function
from rewards.resolve import load_function


def load_advantage(config: RunConfig, base_dir: Path) -> Callable[..., Any] | None:
    """The function that `learner.advantage.estimator` names; None where it names an estimator. Raises: ValueError."""
    estimator = config.learner.advantage.estimator
    return load_function(estimator, base_dir, ADVANTAGE_SETTING) if names_function(estimator) else None
