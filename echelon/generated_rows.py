"""Rows that reasoning-gym generates: `data.train="reasoning_gym:chain_sum,leg_counting"`."""

import re
from typing import Any

PREFIX = "reasoning_gym:"
DEFAULT_ROWS = 1000
EVAL_SEED = 1 << 30
"""A row is drawn from its number added to the seed: far apart, training and evaluation share none by that."""
_tasks = re.compile(r"\w+(,\w+)*")


def is_generated(source: str) -> bool:
    return source.startswith(PREFIX)


def check_generated(key: str, source: str) -> None:
    """Raises: ValueError where it is malformed; whether the tasks exist is seen when they are generated."""
    if not _tasks.fullmatch(source.removeprefix(PREFIX)):
        raise ValueError(f"{key}={source}: expected {PREFIX}TASK or {PREFIX}TASK,TASK, such as {PREFIX}chain_sum")


def generate(key: str, source: str, limit: int) -> list[dict[str, Any]]:
    """`limit` rows (0: 1,000), of the tasks in turn: `question`, `answer`, `metadata`. The same every time.

    Raises: ValueError, in one line, for a task that reasoning-gym does not have, or where it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"{key}={source} needs the package reasoning-gym: {error}") from None
    names = source.removeprefix(PREFIX).split(",")
    size = limit or DEFAULT_ROWS
    seed = 0 if key == "data.train" else EVAL_SEED
    share = -(-size // len(names))
    try:
        tasks = [list(reasoning_gym.create_dataset(name, size=share, seed=seed)) for name in names]
    except ValueError as error:
        raise ValueError(f"{key}={source} cannot be generated: {' '.join(str(error).split())}") from None
    return [row for rows in zip(*tasks, strict=True) for row in rows][:size]
