"""The rewards that requests may name, each with a pool of processes from its first use on."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from msgspec import structs

from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rewards.resolve import BUILT_INS, check_reward, split_reference
from rollout.scoring_process import prepare_scoring
from rollout.service.errors import ServiceError


class Rewards:
    """By name. Use it from the thread of the event loop: pools live as long as the thread that made them."""

    def __init__(self, config: RewardConfig, functions: Mapping[str, str], base_dir: Path) -> None:
        """Args: config: settings of all of them. functions: `PATH.py:FUNCTION` by name, beside the built-ins.

        Raises: ValueError, one line, where one of them is no file.
        """
        for reference in functions.values():
            split_reference(reference, base_dir, "--reward")
        self._config = config
        self._functions = {name: name for name in BUILT_INS} | dict(functions)
        self._base_dir = base_dir
        self._pools: dict[str, RewardPool] = {}
        self._starting = asyncio.Lock()

    def check(self, name: str) -> None:
        """Raises: ServiceError where there is no such reward."""
        if name not in self._functions:
            known = ", ".join(sorted(self._functions))
            raise ServiceError(400, f"there is no reward {name!r}: expected one of {known}", "reward")

    async def pool(self, name: str) -> RewardPool:
        """Started. Raises: ServiceError where it cannot work, as `judge` without a URL."""
        self.check(name)
        async with self._starting:
            if name not in self._pools:
                self._pools[name] = await self._start(name)
            return self._pools[name]

    def counters(self) -> dict[tuple[str, str], float]:
        """By reward and counter of `RewardPool.counters`."""
        return {(name, key): value for name, pool in self._pools.items() for key, value in pool.counters().items()}

    async def close(self) -> None:
        pools, self._pools = list(self._pools.values()), {}
        await asyncio.gather(*(pool.close() for pool in pools))

    async def _start(self, name: str) -> RewardPool:
        config = structs.replace(self._config, function=self._functions[name], parts=())
        pool = None
        try:
            check_reward(config)
            pool = RewardPool(config, self._base_dir, initializer=prepare_scoring)
            await pool.start()
        except BaseException as error:
            if pool is not None:
                await pool.close()
            if isinstance(error, ValueError):
                raise ServiceError(400, f"reward {name!r} cannot be used here: {error}", "reward") from None
            raise
        return pool
