"""Processes that score completions, each completion under its own deadline."""

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import TimeoutError as DeadlineExceeded
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rewards.compose import LoadedPart, PartKind, Parts, load_parts, to_parts
from rewards.config import RewardConfig
from rewards.errors import RewardError
from rewards.python_file import describe
from rewards.resolve import warm_up
from rewards.sample import Sample

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
OWN_DEADLINE_SPARE_S = 1.0


class RewardPool:
    """`config.processes` processes that hold the reward's functions.

    A function that raises, hangs or kills its process costs one `RewardError`; the pool goes on. Call `start` and
    `score` from one thread that lives as long as the pool: processes die with the thread that made them where
    `initializer` asks the kernel for that.

    initializer: called first in every process, such as one that ties its life to the parent's.
    """

    def __init__(self, config: RewardConfig, base_dir: Path, initializer: Callable[[], None] | None = None) -> None:
        self._config = config
        self._kinds: list[PartKind] = []
        self._counters: Counter[str] = Counter()
        self._pool = ProcessPool(
            max_workers=config.processes,
            initializer=_prepare,
            initargs=(config, base_dir, initializer),
            context=multiprocessing.get_context("spawn"),  # type: ignore[arg-type]
        )

    async def start(self) -> None:
        """Load the functions once. Raises: ValueError, one line, where one cannot be loaded."""
        kinds, error = await self._run("reward", _describe_parts, (), START_TIMEOUT_S)
        if error:
            raise ValueError(error)
        self._kinds = kinds

    async def score(self, samples: list[Sample]) -> list[Parts]:
        """Parts of every sample's reward, in order; their sum is the reward.

        Raises: RewardError, one line, for the first sample that cannot be scored; the others are dropped.
        """
        calls = [self._score_part(place, kind, samples) for place, kind in enumerate(self._kinds)]
        by_part = await _all_or_none(calls)
        try:
            return [
                to_parts({name: value for part in each for name, value in part.items()})
                for each in zip(*by_part, strict=True)
            ]
        except ValueError as error:
            raise RewardError(f"the sum of the reward's parts: {error}") from None

    def counters(self) -> dict[str, float]:
        """Since the start, for every part: NAME.scored and NAME.failed completions, NAME.time_s spent on the former.

        A call for a whole group that fails counts as one.
        """
        return dict(self._counters)

    async def close(self) -> None:
        """Stop all processes, busy or not."""
        self._pool.stop()
        await asyncio.to_thread(self._pool.join, STOP_TIMEOUT_S)

    async def _score_part(self, place: int, kind: PartKind, samples: list[Sample]) -> list[Parts]:
        if kind.whole_group:
            return await self._call(place, kind, samples)
        each = await _all_or_none([self._call(place, kind, [sample]) for sample in samples])
        return [parts for one in each for parts in one]

    async def _call(self, place: int, kind: PartKind, samples: list[Sample]) -> list[Parts]:
        limit_s = self._config.timeout_s + (OWN_DEADLINE_SPARE_S if kind.own_deadlines else 0.0)
        name = self._name(kind)
        try:
            parts, error, spent_s = await self._run(name, _score, (place, samples), limit_s)
            if error:
                raise RewardError(f"reward {name!r} failed: {error}")
        except RewardError:
            self._counters[f"{kind.name}.failed"] += 1
            raise
        self._counters[f"{kind.name}.scored"] += len(samples)
        self._counters[f"{kind.name}.time_s"] += spent_s
        return parts

    def _name(self, kind: PartKind) -> str:
        return kind.name if self._config.parts else self._config.function

    async def _run(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> Any:
        future = self._pool.schedule(function, args=args, timeout=timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except DeadlineExceeded:
            raise RewardError(f"reward {name!r} took longer than {timeout_s:g} s and was killed") from None
        except ProcessExpired as error:
            raise RewardError(f"reward {name!r} ended its process (exit code {error.exitcode})") from None


async def _all_or_none(calls: list[Any]) -> list[Any]:
    """All results, in order; where one raises, the others are dropped."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# ---------------------------------------------------------------- inside a scoring process

_parts: list[LoadedPart] = []
_error = "the reward was not loaded"
_timeout_s = 0.0
_loop: asyncio.AbstractEventLoop | None = None


def _prepare(config: RewardConfig, base_dir: Path, initializer: Callable[[], None] | None) -> None:
    """Keeps an error for `start` to tell: pebble 5.2 restarts a process whose initializer raises, forever.

    One event loop serves all calls, so that async functions may keep their connections open.
    """
    global _parts, _error, _timeout_s, _loop
    if initializer is not None:
        initializer()
    _loop, _timeout_s = asyncio.new_event_loop(), config.timeout_s
    try:
        _parts, _error = load_parts(config, base_dir), ""
        warm_up(config)
    except ValueError as error:
        _error = str(error)


def _describe_parts() -> tuple[list[PartKind], str]:
    return [part.kind for part in _parts], _error


def _score(place: int, samples: list[Sample]) -> tuple[list[Parts], str, float]:
    """(parts of each, "", seconds) or ([], error, seconds): text, for an exception of the user's may not pickle."""
    if _error or _loop is None:
        return [], _error, 0.0
    started = time.perf_counter()
    part = _parts[place]
    try:
        scored, error = part.score(samples, _loop, _timeout_s), ""
    except (RewardError, ValueError, TimeoutError) as caught:
        scored, error = [], _ours(caught, part)
    except (Exception, SystemExit) as caught:
        scored, error = [], _describe(caught, part)
    return scored, error, time.perf_counter() - started


def _ours(error: Exception, part: LoadedPart) -> str:
    """What our own code raises is a line for a person already; what a user's raised wants its place."""
    inner = error.__traceback__
    while inner is not None and inner.tb_next is not None:
        inner = inner.tb_next
    own = inner is not None and inner.tb_frame.f_code.co_filename.startswith(str(Path(__file__).parent))
    return str(error) if own or isinstance(error, RewardError) else _describe(error, part)


def _describe(error: BaseException, part: LoadedPart) -> str:
    code = getattr(part.function, "__code__", None)
    return describe(error, Path(code.co_filename) if code else None)
