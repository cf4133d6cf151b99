"""From the name of an environment to its class and to one of it."""

from pathlib import Path
from typing import Any

from rewards.config import RewardConfig
from rewards.resolve import load_function
from rollout.config import EnvironmentConfig
from rollout.environments.base import Environment
from rollout.environments.calculator import Calculator
from rollout.environments.python_tool import PythonTool, check_sandbox

BUILT_INS = ("calculator", "python")
ENVIRONMENT_SETTING = "rollout.environment.name"


def is_file(name: str) -> bool:
    """Does it name a class of a user's, and not one of `BUILT_INS` or none?"""
    return bool(name) and name not in BUILT_INS


def load_class(name: str, base_dir: Path) -> Any:
    """Raises: ValueError, in one line, for a name that there is not, a class that cannot be had, or lacks a method."""
    if name == "calculator":
        return Calculator
    if name == "python":
        check_sandbox()
        return PythonTool
    check_reference(name)
    found = load_function(name, base_dir, ENVIRONMENT_SETTING)
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))]
    if missing or not isinstance(found, type):
        raise ValueError(f"{ENVIRONMENT_SETTING}={name!r} is no environment: expected a class with reset and step")
    return found


def load_environment(config: EnvironmentConfig, reward: RewardConfig, base_dir: Path) -> Environment:
    """Raises: ValueError, as `load_class`, or whatever the class raises itself."""
    found = load_class(config.name, base_dir)
    return found(reward, config.step_s) if found is PythonTool else found()


def tool_schemas(config: EnvironmentConfig, base_dir: Path) -> list[dict[str, Any]]:
    """What a chat template is told of the environment's tools. Raises: ValueError, as `load_class`."""
    return list(getattr(load_class(config.name, base_dir), "tools", ())) if config.name else []


def check_reference(name: str) -> None:
    """Raises: ValueError for a name that is neither built in nor in a file."""
    if is_file(name) and ":" not in name:
        built_in = ", ".join(BUILT_INS)
        raise ValueError(f"{ENVIRONMENT_SETTING}={name!r}: expected {built_in} or PATH.py:CLASS")
