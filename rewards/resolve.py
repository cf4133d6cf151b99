"""From a function's reference in the configuration, a reward's above all, to the function itself."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

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
    function = getattr(_import_file(path, f"{setting}={reference!r}"), name, None)
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


def _import_file(path: Path, source: str) -> ModuleType:
    module_name = f"echelon_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{source}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{source}: importing {path} failed: {describe(error, path)}") from error
    return module


def describe(error: BaseException, path: Path | None = None) -> str:
    """`Type: message (file:line)` in one line; the line is the last one inside `path` where there is one."""
    text = " ".join(str(error).split()) or "no message"
    place = _place(error, path)
    return f"{type(error).__name__}: {text}" + (f" ({place})" if place else "")


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames: list[tuple[str, int]] = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    inside = [frame for frame in frames if path is not None and frame[0] == str(path)]
    last = inside[-1:] or frames[-1:]
    return f"{last[0][0]}:{last[0][1]}" if last else ""
