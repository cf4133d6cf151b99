"""What tests of engines share."""

import asyncio
from typing import Any

import numpy as np

from rollout.engine.base import Completion


def run(scenario: Any) -> Any:
    return asyncio.run(asyncio.wait_for(scenario, 60))


def same(left: list[Completion], right: list[Completion]) -> bool:
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(left, right, strict=True)
    )
