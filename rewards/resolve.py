"""From a function's reference in the configuration, a reward's above all, to the function itself."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rewards.config import RewardConfig
from rewards.python_file import import_file
from rewards.sample import Sample

RewardFunction = Callable[[Sample], Any]

BUILT_INS = {
    "math": "rewards.math:make_math_reward",
    "code": "rewards.code:code_reward",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym_reward",
    "format": "rewards.shape:format_reward",
    "length": "rewards.shape:length_reward",
    "judge": "rewards.judge:judge_reward",
}
"""What makes each of them, from a `RewardConfig`; imported where it is used, for some are slow to import."""
SLOW_IMPORTS = {"math": "math_verify", "reasoning_gym": "reasoning_gym", "judge": "openai"}
REWARD_SETTING = "reward.function"


def load_reward(reference: str, base_dir: Path, config: RewardConfig | None = None) -> RewardFunction:
    """The function that `reference` names: a built-in, or `PATH.py:FUNCTION`, its path relative to `base_dir`.

    Raises: ValueError, in one line, for a malformed reference, a missing file or function, something that
        cannot be called, a file that cannot be imported, or settings that a built-in cannot work with.
    """
    if reference in BUILT_INS:
        module, _, maker = BUILT_INS[reference].partition(":")
        try:
            make = getattr(importlib.import_module(module), maker)
        except ImportError as error:
            raise ValueError(f"reward {reference!r} needs a package that is not installed: {error}") from None
        return make(config or RewardConfig())
    return load_function(reference, base_dir)


def warm_up(config: RewardConfig) -> None:
    """Import what the built-ins need and takes seconds: no completion's deadline should pay for it. A function of the
    user's may call one as well, whose module has been imported by then."""
    named = set(references(config))
    for reference, slow in SLOW_IMPORTS.items():
        if reference in named or BUILT_INS[reference].partition(":")[0] in sys.modules:
            importlib.import_module(slow)


def references(config: RewardConfig) -> list[str]:
    """All functions that the reward names."""
    return [part.function for part in config.parts] or [config.function]


def with_references(config: RewardConfig, change: Callable[[str], str]) -> RewardConfig:
    """The same with every function that is no built-in named as `change` says."""

    def changed(reference: str) -> str:
        return reference if reference in BUILT_INS else change(reference)

    if not config.parts:
        return msgspec.structs.replace(config, function=changed(config.function))
    parts = tuple(msgspec.structs.replace(part, function=changed(part.function)) for part in config.parts)
    return msgspec.structs.replace(config, parts=parts)


def check_reward(config: RewardConfig) -> None:
    """Raises: ValueError, in one line, for settings that do not go together."""
    if config.parts and config.function != RewardConfig().function:
        raise ValueError(f"reward.function is {config.function!r} and reward.parts is set too: set one of them")
    if "code" in references(config) and config.code.total_s >= config.timeout_s:
        raise ValueError(
            f"reward.code.total_s is {config.code.total_s:g}, but after reward.timeout_s={config.timeout_s:g} a "
            "completion's group fails: lower the one or raise the other"
        )
    if "judge" in references(config):
        from rewards.judge import check_judge

        check_judge(config.judge)


def load_function(reference: str, base_dir: Path, setting: str = REWARD_SETTING) -> Callable[..., Any]:
    """The function that a `PATH.py:FUNCTION` reference in `setting` names. Raises: ValueError, as `load_reward`."""
    path, name = split_reference(reference, base_dir, setting)
    try:
        module = import_file(path)
    except ValueError as error:
        raise ValueError(f"{setting}={reference!r}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{setting}={reference!r}: {path} has no function {name!r}")
    if not callable(function):
        raise ValueError(f"{setting}={reference!r}: {name!r} is a {type(function).__name__}, not a function")
    return function


def split_reference(reference: str, base_dir: Path, setting: str = REWARD_SETTING) -> tuple[Path, str]:
    """(existing file, name of the function) of a `PATH.py:FUNCTION` reference; imports nothing."""
    path_text, colon, name = reference.rpartition(":")
    if not colon or not path_text.endswith(".py") or not name.isidentifier():
        built_in = f"{', '.join(BUILT_INS)} or " if setting == REWARD_SETTING else ""
        raise ValueError(f"{setting}={reference!r}: expected {built_in}PATH.py:FUNCTION")
    path = (base_dir / path_text).resolve()
    if not path.is_file():
        raise ValueError(f"{setting}={reference!r}: no such file: {path}")
    return path, name
