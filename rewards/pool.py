"""Processes that score completions, each completion under its own deadline."""

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import TimeoutError as DeadlineExceeded
from numbers import Real
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rewards.config import RewardConfig
from rewards.errors import RewardError
from rewards.python_file import describe
from rewards.resolve import RewardFunction, load_reward
from rewards.sample import Sample

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
DEFAULT_PART = "reward"
LARGEST = 3e38
"""Rewards travel as float32: what is larger becomes infinite."""

Parts = dict[str, float]


class RewardPool:
    """`config.processes` processes that hold the reward function.

    A function that raises, hangs or kills its process costs one `RewardError`; the pool goes on. Call `start` and
    `score` from one thread that lives as long as the pool: processes die with the thread that made them where
    `initializer` asks the kernel for that.

    initializer: called first in every process, such as one that ties its life to the parent's.
    """

    def __init__(self, config: RewardConfig, base_dir: Path, initializer: Callable[[], None] | None = None) -> None:
        self._config = config
        self._pool = ProcessPool(
            max_workers=config.processes,
            initializer=_prepare,
            initargs=(config.function, base_dir, initializer),
            context=multiprocessing.get_context("spawn"),  # type: ignore[arg-type]
        )

    async def start(self) -> None:
        """Load the function once. Raises: ValueError, one line, where it cannot be loaded."""
        error = await self._run(_load_error, (), START_TIMEOUT_S)
        if error:
            raise ValueError(error)

    async def score(self, samples: list[Sample]) -> list[Parts]:
        """Parts of every sample's reward, in order; their sum is the reward.

        Raises: RewardError, one line, for the first sample that cannot be scored; the others are dropped.
        """
        tasks = [asyncio.ensure_future(self._score_one(sample)) for sample in samples]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Stop all processes, busy or not."""
        self._pool.stop()
        await asyncio.to_thread(self._pool.join, STOP_TIMEOUT_S)

    async def _score_one(self, sample: Sample) -> Parts:
        parts, error = await self._run(_score, (sample,), self._config.timeout_s)
        if error:
            raise RewardError(f"reward {self._config.function!r} failed: {error}")
        return parts

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> Any:
        name = self._config.function
        future = self._pool.schedule(function, args=args, timeout=timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except DeadlineExceeded:
            raise RewardError(f"reward {name!r} took longer than {timeout_s:g} s and was killed") from None
        except ProcessExpired as error:
            raise RewardError(f"reward {name!r} ended its process (exit code {error.exitcode})") from None


def to_parts(value: Any) -> Parts:
    """What a reward function returned, as named finite floats.

    Raises: ValueError for another type, an empty dict, or a part or sum that is not finite.
    """
    parts = value if isinstance(value, dict) else {DEFAULT_PART: value}
    if not parts:
        raise ValueError("returned an empty dict; expected at least one part")
    for name, part in parts.items():
        if not isinstance(name, str) or not isinstance(part, Real):
            got = f"{type(part).__name__} for part {name!r}" if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"returned {got}; expected a number or a dict of name -> number")
    for each in (*parts.values(), sum(parts.values())):
        if not abs(each) <= LARGEST:
            raise ValueError(f"returned {value!r}; expected finite numbers, at most {LARGEST:g} in all")
    return {name: float(part) for name, part in parts.items()}


# ---------------------------------------------------------------- inside a scoring process

_function: RewardFunction | None = None
_error = ""


def _prepare(reference: str, base_dir: Path, initializer: Callable[[], None] | None) -> None:
    """Keeps an error for `start` to tell: pebble 5.2 restarts a process whose initializer raises, forever."""
    global _function, _error
    if initializer is not None:
        initializer()
    try:
        _function = load_reward(reference, base_dir)
    except ValueError as error:
        _error = str(error)


def _load_error() -> str:
    return _error


def _score(sample: Sample) -> tuple[Parts, str]:
    """(parts, "") or ({}, error): text, because an exception of the user's may not survive pickling."""
    if _function is None:
        return {}, _error
    try:
        value = _function(sample)
    except (Exception, SystemExit) as error:
        code = getattr(_function, "__code__", None)
        return {}, describe(error, Path(code.co_filename) if code else None)
    try:
        return to_parts(value), ""
    except ValueError as error:
        return {}, str(error)
