"""Processes that answer the model's turns, each answer under its own deadline."""

import asyncio
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import TimeoutError as DeadlineExceeded
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rewards.config import RewardConfig
from rewards.errors import RewardError
from rewards.pool import to_parts
from rewards.python_file import describe
from rollout.config import EnvironmentConfig
from rollout.environments.base import Environment, Step
from rollout.environments.resolve import load_environment
from rollout.environments.tool_calls import error_text

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
SPARE_S = 2.0
"""Beyond `step_s`: an environment that keeps time itself, as the Python tool does, is not killed for it."""


class EnvironmentPool:
    """`config.processes` processes that hold the environment. States travel between them pickled; here they are bytes.

    One that raises, hangs or kills its process costs that one answer, and nobody else's. Call `start` and all else from
    one thread that lives as long as the pool, as with `rewards.pool.RewardPool`. initializer: called first in every
    process.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        reward: RewardConfig,
        base_dir: Path,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._config = config
        self._pool = ProcessPool(
            max_workers=config.processes,
            initializer=_prepare,
            initargs=(config, reward, base_dir, initializer),
            context=multiprocessing.get_context("spawn"),  # type: ignore[arg-type]
        )

    async def start(self) -> None:
        """Load the environment once. Raises: ValueError, one line, where it cannot be loaded."""
        error, lost = await self._run(_load_error, (), START_TIMEOUT_S)
        if error or lost:
            raise ValueError(error or f"rollout.environment.name={self._config.name!r}: {lost}")

    async def reset(self, problem: dict[str, Any]) -> bytes:
        """The state that an episode begins with. Raises: RewardError, one line, where the environment has failed."""
        answer, lost = await self._run(_reset, (problem,), self._config.step_s + SPARE_S)
        state, error = answer or (b"", lost)
        if error:
            raise RewardError(f"environment {self._config.name!r} failed at reset: {error}")
        return state

    async def step(self, state: bytes, turn: str) -> Step:
        """Its answer; one with an error, which leaves the state as it is, where it has none to give.

        Raises: RewardError, one line, for something else than a `Step`, or parts that are no numbers.
        """
        answer, lost = await self._run(_step, (state, turn), self._config.step_s + SPARE_S)
        step, wrong = answer or (failed(f"error: {lost}", state), "")
        if step is None:
            raise RewardError(f"environment {self._config.name!r} failed: {wrong}")
        return step

    async def close(self) -> None:
        """Stop all processes, busy or not."""
        self._pool.stop()
        await asyncio.to_thread(self._pool.join, STOP_TIMEOUT_S)

    async def _run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> tuple[Any, str]:
        """(what it returned, "") or (None, what became of its process)."""
        future = self._pool.schedule(function, args=args, timeout=timeout_s)
        try:
            return await asyncio.wrap_future(future), ""
        except DeadlineExceeded:
            return None, f"the tool took longer than {self._config.step_s:g} s and was killed"
        except ProcessExpired as error:
            return None, f"the tool ended its process (exit code {error.exitcode})"


# ---------------------------------------------------------------- inside one of its processes

_environment: Environment | None = None
_error = ""


def _prepare(
    config: EnvironmentConfig, reward: RewardConfig, base_dir: Path, initializer: Callable[[], None] | None
) -> None:
    """Keeps an error for `start` to tell: pebble 5.2 restarts a process whose initializer raises, forever."""
    global _environment, _error
    if initializer is not None:
        initializer()
    try:
        _environment = load_environment(config, reward, base_dir)
    except ValueError as error:
        _error = str(error)
    except (Exception, SystemExit) as error:
        _error = f"rollout.environment.name={config.name!r}: {describe(error)}"


def _load_error() -> str:
    return _error


def _reset(problem: dict[str, Any]) -> tuple[bytes, str]:
    assert _environment is not None, _error
    try:
        return pickle.dumps(_environment.reset(problem)), ""
    except (Exception, SystemExit) as error:
        return b"", describe(error)


def _step(state: bytes, turn: str) -> tuple[Step | None, str]:
    """(answer, "") or (None, what is wrong with the environment itself)."""
    assert _environment is not None, _error
    try:
        step = _environment.step(pickle.loads(state), turn)
    except (Exception, SystemExit) as error:
        return failed(error_text(error), state), ""
    try:
        return _checked(step), ""
    except Exception as error:  # whatever pickling raises, too
        return None, describe(error)


def failed(text: str, state: bytes) -> Step:
    return Step(output=text, state=state, tool_calls=1, tool_errors=1)


def _checked(step: Any) -> Step:
    """Raises: ValueError for what no model can be told: the environment is none."""
    if not isinstance(step, Step) or not isinstance(step.output, str) or not isinstance(step.parts, dict):
        raise ValueError(f"step returned {step!r:.200}; expected a rollout.environments.base.Step with text as output")
    return Step(
        output=step.output,
        done=bool(step.done),
        parts=to_parts(step.parts) if step.parts else {},
        state=pickle.dumps(step.state),
        tool_calls=int(step.tool_calls),
        tool_errors=int(step.tool_errors),
    )
