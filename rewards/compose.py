"""The parts of a reward: which functions there are, how each is called, and how their values are put together."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from numbers import Real
from pathlib import Path
from typing import Any

from msgspec import Struct

from rewards.config import RewardConfig, RewardPart
from rewards.resolve import load_reward
from rewards.sample import Sample

DEFAULT_PART = "reward"
LARGEST = 3e38
"""Rewards travel as float32: what is larger becomes infinite."""
BATCH_PARAMETER = "samples"

Parts = dict[str, float]


class PartKind(Struct, frozen=True, kw_only=True):
    """name: for metrics and messages. whole_group: it is called once a group, not once a completion.

    own_deadlines: it keeps completions' deadlines itself, since it waits for all of them at once.
    """

    name: str
    whole_group: bool
    own_deadlines: bool


class LoadedPart:
    """One function with its weight.

    An async function is called for all completions of a group at once; one whose parameter is called `samples` gets
    the group's completions as a list, and returns a list.
    """

    def __init__(self, part: RewardPart, function: Callable[..., Any], *, alone: bool) -> None:
        called = function if inspect.isfunction(function) or inspect.ismethod(function) else type(function).__call__
        self.function = function
        self._weight = part.weight
        self._alone = alone
        self._batch = next(iter(inspect.signature(function).parameters), "") == BATCH_PARAMETER
        self._async = inspect.iscoroutinefunction(called)
        name = part.name or part.function.rpartition(":")[2]
        self.kind = PartKind(
            name=name, whole_group=self._batch or self._async, own_deadlines=self._async and not self._batch
        )

    def score(self, samples: list[Sample], loop: asyncio.AbstractEventLoop, timeout_s: float) -> list[Parts]:
        """Weighted values of every sample. Raises: ValueError for what is no value; whatever the function raises."""
        if self._batch:
            values = self.function(samples)
            values = loop.run_until_complete(values) if self._async else values
            if not isinstance(values, list | tuple) or len(values) != len(samples):
                got = f"{len(values)} values" if isinstance(values, list | tuple) else type(values).__name__
                raise ValueError(f"returned {got}; expected a list of {len(samples)} values, one a sample")
        elif self._async:
            calls = [within(self.function(sample), timeout_s) for sample in samples]
            values = loop.run_until_complete(all_of(calls))
        else:
            values = [self.function(sample) for sample in samples]
        return [self._weighted(value) for value in values]

    def _weighted(self, value: Any) -> Parts:
        name = DEFAULT_PART if self._alone else self.kind.name
        prefix = f"{name}." if isinstance(value, dict) and not self._alone else ""
        parts = to_parts(value, name)
        return {f"{prefix}{part}": self._weight * number for part, number in parts.items()}


def load_parts(config: RewardConfig, base_dir: Path) -> list[LoadedPart]:
    """All of a reward's functions. Raises: ValueError, in one line."""
    alone = not config.parts
    parts = config.parts or (RewardPart(function=config.function),)
    loaded = [LoadedPart(part, load_reward(part.function, base_dir, config), alone=alone) for part in parts]
    names = [part.kind.name for part in loaded]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"reward.parts has {names.count(name)} parts named {name!r}: give each a `name` of its own"
            )
    return loaded


def to_parts(value: Any, name: str = DEFAULT_PART) -> Parts:
    """What a reward function returned, as named finite floats.

    Raises: ValueError for another type, an empty dict, or a part or sum that is not finite.
    """
    parts = value if isinstance(value, dict) else {name: value}
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


async def within(call: Awaitable[Any], timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        raise TimeoutError(f"took longer than {timeout_s:g} s") from None


async def all_of(calls: list[Any]) -> list[Any]:
    """Their values, or what the first of them raised, once all have ended."""
    values = await asyncio.gather(*calls, return_exceptions=True)
    for value in values:
        if isinstance(value, BaseException):
            raise value
    return values
