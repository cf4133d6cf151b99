"""A client of `echelon serve`: groups as they are done, and what is served. OpenAI's own client does the rest.

ServiceUnreachable   nobody answered, or not in time, or the answer was cut off
RequestFailed        the service answered, and with an error
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from rollout.service.errors import ErrorBody, ErrorFields
from rollout.service.protocol import (
    FailedGroup,
    Finished,
    FollowRequest,
    LoadRequest,
    Prompt,
    RolloutLine,
    RolloutRequest,
    SamplingFields,
    ScoredGroup,
    Weights,
)

CONNECT_S = 10.0
UPDATE_S = 600.0
SPARE_S = 30.0
"""Beyond a group's own time, for its line to come."""

T = TypeVar("T")

_line: "msgspec.json.Decoder[RolloutLine]" = msgspec.json.Decoder(RolloutLine)


class ServiceUnreachable(RuntimeError):
    """One line for a person."""


class RequestFailed(RuntimeError):
    """As the service said it. `fields` has the status, and the field that was wrong."""

    def __init__(self, fields: ErrorFields) -> None:
        super().__init__(f"{fields.code}: {fields.message}")
        self.fields = fields


class ServiceClient:
    """One service. Use it as a context manager, or `close` it; from one thread at a time."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Args: url: without `/v1`. key: the API key, or the admin key for what changes weights."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(CONNECT_S))

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        group_size: int = 1,
        reward: str | None = None,
        timeout_s: float = 600.0,
    ) -> Iterator[ScoredGroup | FailedGroup]:
        """The groups of all prompts, in the order in which they are done; `index` says whose. To stop listening ends
        what is under way.

        Args: as `RolloutRequest`. Raises: RequestFailed; ServiceUnreachable.
        """
        request = RolloutRequest(
            prompts=list(prompts),
            sampling=SamplingFields(max_tokens=max_tokens, temperature=temperature),
            group_size=group_size,
            reward=reward,
            timeout_s=timeout_s,
        )
        # Between two lines there may be what a request has to wait for, and the whole time of a group.
        limit = httpx.Timeout(CONNECT_S, read=2 * timeout_s + SPARE_S)
        body = msgspec.json.encode(request)
        headers = {"content-type": "application/json"}
        try:
            with self._http.stream("POST", "/v1/rollouts", content=body, headers=headers, timeout=limit) as answer:
                _check(answer)
                yield from _groups(answer.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def weights(self) -> Weights:
        """What is served. Raises: RequestFailed; ServiceUnreachable."""
        return self._get("/v1/weights", Weights)

    def load(self, path: str, version: int | None = None) -> Weights:
        """Serve a folder's weights, named as the service's machine knows it. Raises: as above."""
        return self._post("/v1/weights/load", LoadRequest(path=path, version=version))

    def follow(self, run: str, keys: str | None = None) -> Weights:
        """Serve a run's versions as they come. Raises: as above."""
        return self._post("/v1/weights/follow", FollowRequest(run=run, keys=keys))

    def unfollow(self) -> Weights:
        """Raises: as above."""
        return self._post("/v1/weights/unfollow", None)

    def is_ready(self) -> bool:
        """Does it answer, and take requests?"""
        try:
            return self._http.get("/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get(self, path: str, kind: type[T]) -> T:
        return self._ask(self._http.build_request("GET", path), kind)

    def _post(self, path: str, body: Any) -> Weights:
        content = b"{}" if body is None else msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        limit = httpx.Timeout(CONNECT_S, read=UPDATE_S)
        return self._ask(
            self._http.build_request("POST", path, content=content, headers=headers, timeout=limit), Weights
        )

    def _ask(self, request: httpx.Request, kind: type[T]) -> T:
        try:
            answer = self._http.send(request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        _check(answer)
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError as error:
            raise ServiceUnreachable(f"what answers at {self._http.base_url} is no `echelon serve`: {error}") from None

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnreachable:
        what = "no answer in time from" if isinstance(error, httpx.TimeoutException) else "cannot reach"
        return ServiceUnreachable(f"{what} {self._http.base_url}: {error or type(error).__name__}")


def _groups(lines: Iterator[str]) -> Iterator[ScoredGroup | FailedGroup]:
    for text in lines:
        line = _line.decode(text)
        if isinstance(line, Finished):
            return
        yield line
    raise ServiceUnreachable("the answer was cut off: the service has stopped, or was told to")


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        fields = msgspec.json.decode(answer.read(), type=ErrorBody).error
    except msgspec.DecodeError:
        text = " ".join(answer.text.split())[:200]
        fields = ErrorFields(message=text or answer.reason_phrase, type="Error", code=answer.status_code)
    raise RequestFailed(fields)
