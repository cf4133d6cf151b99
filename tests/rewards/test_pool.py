import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rewards.config import RewardConfig
from rewards.errors import RewardError
from rewards.pool import RewardPool, to_parts
from rewards.sample import Sample

REWARDS = """
import os, sys, time

def reward(sample):
    match sample.completion:
        case "hang": time.sleep(600)
        case "raise": raise KeyError("no such\\nkey")
        case "exit": sys.exit(3)
        case "die": os._exit(7)
        case "nan": return float("nan")
        case "text": return "1.0"
        case "parts": return {"format": 0.25, "answer": 1}
        case other: return len(other)
"""


def sample(completion: str) -> Sample:
    return Sample(prompt="p", completion=completion, problem={"a": 1}, num_tokens=1, truncated=False)


@asynccontextmanager
async def pool(folder: Path, **settings: Any) -> AsyncIterator[RewardPool]:
    (folder / "mine.py").write_text(REWARDS)
    pool = RewardPool(RewardConfig(**{"function": "mine.py:reward", "timeout_s": 1.0} | settings), folder)
    try:
        yield pool
    finally:
        await pool.close()


def test_pool_survives_everything(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, processes=2) as scorer:
            await scorer.start()
            assert await scorer.score([sample("abc"), sample("parts"), sample("")]) == [
                {"reward": 3.0},
                {"format": 0.25, "answer": 1.0},
                {"reward": 0.0},
            ]
            for completion, says in [
                ("raise", r"^reward 'mine.py:reward' failed: KeyError: 'no such\\nkey' \(.*mine.py:7\)$"),
                ("exit", "SystemExit: 3"),
                ("die", r"ended its process \(exit code 7\)"),
                ("nan", "returned nan; expected finite numbers"),
                ("text", "returned str; expected a number or a dict"),
            ]:
                with pytest.raises(RewardError, match=says):
                    await scorer.score([sample("ok"), sample(completion)])
            started = time.monotonic()
            with pytest.raises(RewardError, match=r"'mine.py:reward' took longer than 1 s and was killed"):
                await scorer.score([sample("ok"), sample("hang")])
            assert 0.9 < time.monotonic() - started < 4.0
            assert await scorer.score([sample("alive")]) == [{"reward": 5.0}]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_bad_reference_fails_at_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, function="mine.py:absent") as scorer:
            with pytest.raises(ValueError, match="has no function 'absent'"):
                await scorer.start()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_close_kills_a_hanging_function(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, timeout_s=600.0) as scorer:
            await scorer.start()
            hanging = asyncio.ensure_future(scorer.score([sample("hang")]))
            await asyncio.sleep(0.3)
            children = scoring_processes(os.getpid())
            hanging.cancel()
        assert children
        assert not psutil.wait_procs(children, timeout=10)[1]

    asyncio.run(asyncio.wait_for(scenario(), 60))


ORPHAN_SCRIPT = """
import asyncio, sys
from pathlib import Path
from databus.process import die_with_parent
from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rewards.sample import Sample

async def main():
    config = RewardConfig(function="mine.py:reward", timeout_s=600.0)
    pool = RewardPool(config, Path(sys.argv[1]), initializer=die_with_parent)
    await pool.start()
    print("ready", flush=True)
    await pool.score([Sample(prompt="", completion="hang", problem={}, num_tokens=1, truncated=False)])

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN_SCRIPT)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert scoring_processes(parent.pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    assert not psutil.wait_procs(children, timeout=10)[1]


def scoring_processes(parent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children(recursive=True) if is_scoring(child)]


def is_scoring(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
        return "spawn_main" in " ".join(process.cmdline())
    return False


@pytest.mark.parametrize(
    ("value", "parts"),
    [(1, {"reward": 1.0}), (True, {"reward": 1.0}), ({"a": 0.5, "b": -1}, {"a": 0.5, "b": -1.0})],
)
def test_parts(value: object, parts: dict[str, float]) -> None:
    assert to_parts(value) == parts


@pytest.mark.parametrize("value", [None, {}, {"a": None}, {1: 2.0}, [1.0], 1j])
def test_not_parts(value: object) -> None:
    with pytest.raises(ValueError, match="returned"):
        to_parts(value)


@pytest.mark.parametrize(
    "value",
    [float("inf"), float("nan"), {"a": float("nan")}, {"a": 1.0, "b": -float("inf")}, 1e39, {"a": 2e38, "b": 2e38}],
)
def test_neither_a_reward_nor_their_sum_may_be_infinite_on_the_bus(value: object) -> None:
    with pytest.raises(ValueError, match=r"returned .*; expected finite numbers, at most 3e\+38 in all"):
        to_parts(value)
    assert np.isfinite(np.float32(sum(to_parts({"a": 1.5e38, "b": 1.5e38}).values())))
