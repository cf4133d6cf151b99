"""From a function's reference in the configuration, a reward's above all, to the function itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards.python_file import import_file
from rewards.sample import Sample

RewardFunction = Callable[[Sample], Any]

BUILT_IN = "math"
REWARD_SETTING = "reward.function"


def load_reward(reference: str, base_dir: Path) -> RewardFunction:
    """The function that `reference` names: `math`, or `PATH.py:FUNCTION`, its path relative to `base_dir`.

    Raises: ValueError, in one line, for a malformed reference, a missing file or function, something that
        cannot be called, or a file that cannot be imported.
    """
    if reference == BUILT_IN:
        from rewards.math import math_reward

        return math_reward
    return load_function(reference, base_dir)


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
        built_in = f"{BUILT_IN!r} or " if setting == REWARD_SETTING else ""
        raise ValueError(f"{setting}={reference!r}: expected {built_in}PATH.py:FUNCTION")
    path = (base_dir / path_text).resolve()
    if not path.is_file():
        raise ValueError(f"{setting}={reference!r}: no such file: {path}")
    return path, name
