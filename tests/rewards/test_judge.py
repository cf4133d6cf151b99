"""The judge against a server on this machine that answers as it is told."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rewards.config import JudgeConfig, RewardConfig
from rewards.errors import RewardError
from rewards.judge import Judge, JudgeError, check_judge, read_mark
from rewards.pool import RewardPool
from rewards.sample import Sample


class Endpoint:
    """`answers`, one a request, the last for ever: a text to say, a status, or a pause in seconds."""

    def __init__(self) -> None:
        self.answers: list[str | int | float] = ["Mark: 7"]
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.times.append(time.monotonic())
                endpoint.requests.append(body | {"path": self.path, "key": self.headers["Authorization"]})
                answer = endpoint.answers.pop(0) if len(endpoint.answers) > 1 else endpoint.answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": str(answer)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                said = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                content = (
                    b"<html>"
                    if answer == "html"
                    else json.dumps(said if status == 200 else {"error": {"message": "busy"}}).encode()
                )
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status == 429:
                    self.send_header("Retry-After", "0.01")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # it has not waited
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,))
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    thread.join()
    endpoint.server.server_close()


def marks(endpoint: Endpoint, *completions: str, rate: float = 0.0, **settings: Any) -> list[Any]:
    """Rewards, or errors, of completions that are judged at once."""
    config = JudgeConfig(**{"url": endpoint.url, "model": "m", "retries": 2, "request_s": 5.0} | settings)

    async def ask() -> list[Any]:
        judge = Judge(config, rate)
        samples = [
            Sample(prompt="2+2?", completion=text, problem={"answer": "4"}, num_tokens=1, truncated=False)
            for text in completions
        ]
        try:
            return await asyncio.gather(*(judge.score(sample) for sample in samples), return_exceptions=True)
        finally:
            await judge._client.close()

    return asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_mark_is_the_reward(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    rubric = "{prompt} {completion} (right: {answer})"
    assert marks(endpoint, "four", rubric=rubric, api_key_env="JUDGE_KEY", system="Mark.") == [0.7]
    (request,) = endpoint.requests
    assert (request["path"], request["key"], request["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert [each["content"] for each in request["messages"]] == ["Mark.", "2+2? four (right: 4)"]


def test_equal_answers_are_judged_once(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = str(tmp_path / "deep" / "marks.sqlite")
    assert marks(endpoint, "a", "a", "b", cache=cache) == [0.7] * 3
    assert len(endpoint.requests) == 2
    assert marks(endpoint, "a", "b", cache=cache) == [0.7] * 2
    assert len(endpoint.requests) == 2
    marks(endpoint, "a", cache=cache, model="other")
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("trouble", [[429, 503], ["What a nice answer."], ["Mark: 11", "Mark: -1"], ["html"]])
def test_trouble_that_passes(endpoint: Endpoint, trouble: list[str | int | float]) -> None:
    endpoint.answers = [*trouble, "Mark: 10"]
    result = marks(endpoint, "a")
    assert result == [1.0] if trouble != ["html"] else isinstance(result[0], JudgeError)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (429, r"^the judge at http://127.0.0.1:\d+/v1 failed: .*429"),
        (500, "failed: .*500"),
        (401, "failed: .*401"),
        ("As an AI\nI", r"gave no mark from 0 to 10 in 3 answers; the last: 'As an AI I'"),
        (3.0, "failed: APITimeoutError"),
    ],
)
def test_trouble_that_stays_is_one_line(endpoint: Endpoint, answer: str | int | float, says: str) -> None:
    endpoint.answers = [answer]
    (error,) = marks(endpoint, "a", request_s=0.3)
    assert isinstance(error, JudgeError)
    with pytest.raises(JudgeError, match=says):
        raise error
    assert "\n" not in str(error)
    assert len(endpoint.requests) == (1 if answer == 401 else 3)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("As an AI", "the judge m gave no mark from 0 to 10 in 2 answers"),
        (429, r"the judge at \S+ failed: .*429"),
        (1.5, r"the judge at \S+ failed: APITimeoutError"),
        ("html", r"the judge at \S+ failed: "),
    ],
)
def test_in_the_pool_trouble_is_one_counted_error(
    endpoint: Endpoint, tmp_path: Path, trouble: str | int | float, says: str
) -> None:
    """As a worker scores: the group fails with the judge's line, and the next one is marked."""
    endpoint.answers = [trouble] * (1 if trouble == "html" else 2) + ["Mark: 5"]
    judge = JudgeConfig(url=endpoint.url, model="m", retries=1, request_s=1.0)
    sample = Sample(prompt="2+2?", completion="4", problem={}, num_tokens=1, truncated=False)

    async def scenario() -> None:
        pool = RewardPool(RewardConfig(function="judge", judge=judge, timeout_s=30.0), tmp_path)
        try:
            await pool.start()
            with pytest.raises(RewardError, match=f"^reward 'judge' failed: {says}") as caught:
                await pool.score([sample])
            assert "\n" not in str(caught.value)
            assert await pool.score([sample]) == [{"reward": 0.5}]
            assert (pool.counters()["judge.failed"], pool.counters()["judge.scored"]) == (1, 1)
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 90))


def test_nobody_there() -> None:
    config = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", retries=0)
    sample = Sample(prompt="", completion="a", problem={}, num_tokens=1, truncated=False)
    with pytest.raises(JudgeError, match="failed: APIConnectionError"):
        asyncio.run(Judge(config, 0.0).score(sample))


def test_the_rate_is_kept(endpoint: Endpoint) -> None:
    assert marks(endpoint, *"abcd", rate=2.0) == [0.7] * 4
    assert max(endpoint.times) - min(endpoint.times) >= 1.0


def test_a_rubric_without_its_field(endpoint: Endpoint) -> None:
    (error,) = marks(endpoint, "a", rubric="{gold}")
    assert str(error) == (
        "reward.judge.rubric names 'gold', which is not among prompt, completion and the problem's fields: answer"
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "reward.judge.url is empty"), ({"url": "http://x"}, "reward.judge.model is empty"),
        ({"url": "http://x", "model": "m", "api_key_env": "NO_SUCH_KEY"}, "names NO_SUCH_KEY, which is not set"),
        ({"url": "http://x", "model": "m", "rubric": "{"}, "reward.judge.rubric is malformed"),
    ],
)  # fmt: skip
def test_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_judge(RewardConfig(judge=JudgeConfig(**settings)).judge)


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Mark: 7", 7),
        ("**Mark:** 7.5/10", 7.5),
        ("Mark: 3, no: Mark: 4", 4),
        ("8", 8),
        (" 8/10. ", 8),
        ("I give 8", None),
        ("", None),
    ],
)
def test_marks_are_read(text: str, mark: float | None) -> None:
    assert read_mark(text) == mark
