import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rewards.compose import load_parts
from rewards.config import FormatConfig, JudgeConfig, LengthConfig, RewardConfig, RewardPart
from rewards.errors import RewardError
from rewards.pool import RewardPool
from rewards.resolve import check_reward
from rewards.sample import Sample

SOURCE = """
import asyncio, time

def pieces(sample): return {"even": len(sample.completion) % 2 == 0, "one": 1}

async def slow(sample):
    await asyncio.sleep(600 if sample.completion == "hang" else 0.2)
    if sample.completion == "raise": raise KeyError("x")
    return len(sample.completion)

def batch(samples): return [rank for rank, _ in enumerate(samples)]
async def async_batch(samples): return [0.5 for _ in samples]
def short_batch(samples): return [1.0]
class Callable_:
    async def __call__(self, sample): return 2.0
instance = Callable_()
"""


def sample(completion: str, **problem: object) -> Sample:
    return Sample(prompt="p", completion=completion, problem=problem, num_tokens=len(completion), truncated=False)


@asynccontextmanager
async def pool(folder: Path, config: RewardConfig) -> AsyncIterator[RewardPool]:
    (folder / "mine.py").write_text(SOURCE)
    pool = RewardPool(config, folder)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


def part(name: str, **settings: object) -> RewardPart:
    return RewardPart(function=f"mine.py:{name}", **settings)  # type: ignore[arg-type]


def test_parts_are_weighted_named_and_counted(tmp_path: Path) -> None:
    parts = (
        RewardPart(function="math", weight=2.0),
        RewardPart(function="length", weight=0.5, name="brief"),
        part("pieces", weight=0.1),
        part("slow", weight=10.0),
        part("batch"),
        part("async_batch"),
        part("instance"),
    )
    config = RewardConfig(parts=parts, timeout_s=5.0, length=LengthConfig(max_tokens=4, slack_tokens=4))

    async def scenario() -> None:
        async with pool(tmp_path, config) as scorer:
            loop = asyncio.get_running_loop()
            await scorer.score([sample("#### 7", answer="7")])
            started = loop.time()
            first, second = await scorer.score([sample("#### 7", answer="7"), sample("8", answer="7")])
            assert loop.time() - started < 5.0
            assert first == pytest.approx(
                {
                    "math": 2.0,
                    "brief": 0.25,
                    "pieces.even": 0.1,
                    "pieces.one": 0.1,
                    "slow": 60.0,
                    "batch": 0,
                    "async_batch": 0.5,
                    "instance": 2,
                }
            )
            assert second["math"] == 0.0 and second["batch"] == 1.0 and second["pieces.even"] == 0.0
            with pytest.raises(RewardError, match=r"^reward 'slow' failed: KeyError: 'x' \(.*mine.py:8\)$"):
                await scorer.score([sample("raise", answer="7")])
            counters = scorer.counters()
            assert counters["math.scored"] >= 3
            assert counters["slow.scored"] == 3 and counters["slow.failed"] == 1
            assert 0.3 < counters["slow.time_s"] < 5.0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_async_function_has_a_deadline_for_each_completion(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, RewardConfig(function="mine.py:slow", timeout_s=1.0)) as scorer:
            with pytest.raises(RewardError, match=r"'mine.py:slow' failed: took longer than 1 s"):
                await scorer.score([sample("ok"), sample("hang")])
            assert await scorer.score([sample("ok")] * 30) == [{"reward": 2.0}] * 30  # 6 s, one after the other

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_batch_of_another_length_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, RewardConfig(function="mine.py:short_batch")) as scorer:
            with pytest.raises(RewardError, match="returned 1 values; expected a list of 2 values, one a sample"):
                await scorer.score([sample("a"), sample("b")])

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("name", "problem", "says"),
    [
        ("math", {"question": "?"}, "the math reward needs a field 'answer'; the problem has: question"),
        ("math", {"answer": "####"}, r"problem\['answer'\] = '' has no answer to compare with"),
        ("code", {"input_output": {"inputs": ["1", "2"], "outputs": ["1"]}}, "1 outputs: a test case is missing"),
        ("code", {"test_list": []}, r"the code reward needs tests .* the problem has: test_list \(empty\)"),
    ],
)
def test_a_problem_that_cannot_be_scored_is_one_counted_error(
    tmp_path: Path, name: str, problem: dict[str, object], says: str
) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, RewardConfig(function=name, timeout_s=30.0)) as scorer:
            with pytest.raises(RewardError, match=f"^reward '{name}' failed: .*{says}") as caught:
                await scorer.score([sample("7", **problem)])
            assert "\n" not in str(caught.value)
            assert scorer.counters() == {f"{name}.failed": 1}

    asyncio.run(asyncio.wait_for(scenario(), 90))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (RewardConfig(function="maths"), "reward.function='maths': expected math, code, .* or PATH.py:FUNCTION"),
        (RewardConfig(parts=(RewardPart(function="math"),) * 2), "2 parts named 'math': give each a `name`"),
        (
            RewardConfig(function="format", format=FormatConfig(pattern="(")),
            "reward.format.pattern='\\(' is no regular",
        ),
        (
            RewardConfig(function="length", length=LengthConfig(min_tokens=9, max_tokens=3)),
            "min_tokens is 9 and max_tokens 3",
        ),
        (RewardConfig(function="judge"), "reward.judge.url is empty"),
    ],
)
def test_bad_settings_are_one_line(tmp_path: Path, config: RewardConfig, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load_parts(config, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (RewardConfig(function="a.py:f", parts=(RewardPart(function="math"),)), "reward.parts is set too"),
        (RewardConfig(function="code", timeout_s=5.0), "reward.code.total_s is 8, but after reward.timeout_s=5"),
        (RewardConfig(function="judge", judge=JudgeConfig(url="x", model="m")), "reward.judge.url='x': expected http"),
    ],
)
def test_settings_that_do_not_go_together(config: RewardConfig, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_reward(config)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("format", "<think>a\nb</think>\nc", 1.0), ("format", "<think>a</think>", 0.0), ("format", "c", 0.0),
        ("length", "x" * 10, 1.0), ("length", "x" * 15, 0.5), ("length", "x" * 30, 0.0), ("length", "", 0.5),
    ],
)  # fmt: skip
def test_format_and_length(tmp_path: Path, name: str, text: str, value: float) -> None:
    config = RewardConfig(function=name, length=LengthConfig(min_tokens=5, max_tokens=10, slack_tokens=10))
    (loaded,) = load_parts(config, tmp_path)
    assert loaded.function(sample(text)) == value
