"""The built-in `judge` reward: a model behind an OpenAI-compatible endpoint marks the completion.

The openai client retries, with growing pauses and as `Retry-After` says, after 408, 409, 429, 5xx, lost connections and
time-outs; an answer without a mark is asked for again here.
"""

import asyncio
import hashlib
import os
import re
import sqlite3
import string
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from rewards.config import JudgeConfig, RewardConfig
from rewards.errors import RewardError
from rewards.sample import Sample

_mark = re.compile(r"mark[^\w-]{1,9}(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_lone_number = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:/\s*\d+\s*)?\.?\s*")
LONGEST_KEPT = 80
CACHE_WAIT_S = 5.0


class JudgeError(RewardError):
    """The judge gave no mark."""


def judge_reward(config: RewardConfig) -> Callable[[Sample], Awaitable[float]]:
    """An async function that asks for a mark. Raises: ValueError for settings that cannot work."""
    check_judge(config.judge)
    return Judge(config.judge, config.judge.requests_per_s / config.processes).score


def check_judge(config: JudgeConfig) -> None:
    """Raises: ValueError, in one line naming the setting."""
    for name in ("url", "model"):
        if not getattr(config, name):
            raise ValueError(f"reward.judge.{name} is empty: the judge reward needs the endpoint's url and a model")
    if not config.url.startswith(("http://", "https://")):
        raise ValueError(f"reward.judge.url={config.url!r}: expected http://HOST:PORT/v1 or https://...")
    if config.api_key_env and config.api_key_env not in os.environ:
        raise ValueError(f"reward.judge.api_key_env names {config.api_key_env}, which is not set")
    try:
        list(string.Formatter().parse(config.rubric))
    except ValueError as error:
        raise ValueError(f"reward.judge.rubric is malformed: {error}; write {{{{ and }}}} for braces") from None


class Judge:
    """Asks, keeps marks, and holds itself to a rate. For one event loop."""

    def __init__(self, config: JudgeConfig, requests_per_s: float) -> None:
        from openai import AsyncOpenAI

        key = os.environ[config.api_key_env] if config.api_key_env else "none"
        self._config = config
        self._client = AsyncOpenAI(
            base_url=config.url, api_key=key, max_retries=config.retries, timeout=config.request_s
        )
        self._marks = Marks(Path(config.cache) if config.cache else None)
        self._asking: dict[str, asyncio.Task[float]] = {}
        self._room = asyncio.Semaphore(config.concurrent)
        self._pause_s = 1 / requests_per_s if requests_per_s > 0 else 0.0
        self._next = 0.0
        self._turns = asyncio.Lock()

    async def score(self, sample: Sample) -> float:
        """The mark as a share of `max_mark`. Raises: JudgeError; ValueError where the rubric does not fit the row."""
        messages = self._messages(sample)
        key = hashlib.sha256(repr((self._config.model, self._config.temperature, messages)).encode()).hexdigest()
        known = self._marks.get(key)
        if known is not None:
            return known
        task = self._asking.get(key)
        if task is None:  # two equal answers of a group are asked about once
            task = self._asking[key] = asyncio.ensure_future(self._ask(key, messages))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(task)

    def _messages(self, sample: Sample) -> list[dict[str, str]]:
        fields = sample.problem | {"prompt": sample.prompt, "completion": sample.completion}
        try:
            text = self._config.rubric.format_map(fields)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                f"reward.judge.rubric names {error}, which is not among prompt, completion and the problem's fields: "
                f"{', '.join(sample.problem) or 'none'}"
            ) from None
        system = [{"role": "system", "content": self._config.system}] if self._config.system else []
        return [*system, {"role": "user", "content": text}]

    async def _ask(self, key: str, messages: list[dict[str, str]]) -> float:
        said = ""
        for _ in range(self._config.retries + 1):
            said = await self._request(messages)
            mark = read_mark(said)
            if mark is not None and 0 <= mark <= self._config.max_mark:
                self._marks.keep(key, mark / self._config.max_mark)
                return mark / self._config.max_mark
        raise JudgeError(
            f"the judge {self._config.model} gave no mark from 0 to {self._config.max_mark:g} in "
            f"{self._config.retries + 1} answers; the last: {' '.join(said.split())[:LONGEST_KEPT]!r}"
        )

    async def _request(self, messages: list[Any]) -> str:
        from openai import OpenAIError

        async with self._room:
            await self._turn()
            try:
                answer = await self._client.chat.completions.create(
                    model=self._config.model,
                    messages=messages,
                    max_tokens=self._config.max_tokens,
                    temperature=self._config.temperature,
                )
                return answer.choices[0].message.content or ""
            except (
                OpenAIError,
                ValueError,
                LookupError,
                AttributeError,
                TypeError,
            ) as error:  # or no such answer at all
                raise JudgeError(f"the judge at {self._config.url} failed: {one_line(error)}") from None

    async def _turn(self) -> None:
        """Wait for this request's place in the rate; the client's own retries are beside it."""
        if self._pause_s <= 0:
            return
        async with self._turns:  # one after the other: a process that was held up does not make up for it
            await asyncio.sleep(max(0.0, self._next - time.monotonic()))
            self._next = time.monotonic() + self._pause_s


def read_mark(text: str) -> float | None:
    """The number of the last `Mark: N`, or of a text that is nothing but a number."""
    marks = _mark.findall(text)
    if marks:
        return float(marks[-1])
    alone = _lone_number.fullmatch(text)
    return float(alone[1]) if alone else None


def one_line(error: BaseException) -> str:
    status = getattr(error, "status_code", None)
    text = " ".join(str(error).split())[: 2 * LONGEST_KEPT]
    return f"{type(error).__name__}: {text}" if status is None or str(status) in text else f"HTTP {status}: {text}"


class Marks:
    """Marks by what was asked: in memory, and in a file that several processes share where one is named."""

    def __init__(self, file: Path | None) -> None:
        self._kept: dict[str, float] = {}
        self._file = file
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS marks (key TEXT PRIMARY KEY, mark REAL) WITHOUT ROWID")

    def get(self, key: str) -> float | None:
        if key not in self._kept and self._file is not None:
            with self._open() as database:
                row = database.execute("SELECT mark FROM marks WHERE key = ?", (key,)).fetchone()
            if row is not None:
                self._kept[key] = row[0]
        return self._kept.get(key)

    def keep(self, key: str, mark: float) -> None:
        self._kept[key] = mark
        if self._file is not None:
            with self._open() as database, database:
                database.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (key, mark))

    def _open(self) -> Any:
        assert self._file is not None
        return closing(sqlite3.connect(self._file, timeout=CACHE_WAIT_S))
