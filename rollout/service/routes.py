"""Our own routes, beside vLLM's."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rollout.service.doors import Doors
from rollout.service.errors import ServiceError
from rollout.service.protocol import FollowRequest, LoadRequest, RolloutLine
from rollout.service.rollouts import RolloutDesk, read_json
from rollout.service.weights import WeightDesk

MAX_BODY_BYTES = 64 << 20
JSON, NDJSON = "application/json", "application/x-ndjson"

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]


def add_routes(app: Any, rollouts: RolloutDesk, desk: WeightDesk, doors: Doors) -> None:
    """Args: app: a FastAPI app, changed in place."""

    async def rollout(request: Request) -> Response:
        job = await rollouts.accept(await _body(request))
        return _Lines(rollouts.run(job))

    async def weights(request: Request) -> Response:
        return Response(msgspec.json.encode(desk.weights()), media_type=JSON)

    async def load(request: Request) -> Response:
        return Response(msgspec.json.encode(await desk.load(await _read(request, LoadRequest))), media_type=JSON)

    async def follow(request: Request) -> Response:
        return Response(msgspec.json.encode(await desk.follow(await _read(request, FollowRequest))), media_type=JSON)

    async def unfollow(request: Request) -> Response:
        return Response(msgspec.json.encode(await desk.unfollow()), media_type=JSON)

    async def ready(request: Request) -> Response:
        if doors.draining:
            raise ServiceError(503, "the service is shutting down", type="ServiceUnavailableError")
        return Response(status_code=200)

    app.router.routes += [
        Route("/v1/rollouts", _answering(rollout), methods=["POST"]),
        Route("/v1/weights", _answering(weights), methods=["GET"]),
        Route("/v1/weights/load", _answering(load), methods=["POST"]),
        Route("/v1/weights/follow", _answering(follow), methods=["POST"]),
        Route("/v1/weights/unfollow", _answering(unfollow), methods=["POST"]),
        Route("/ready", _answering(ready), methods=["GET"]),
    ]


def _answering(route: Endpoint) -> Endpoint:
    """Errors as answers. vLLM (0.32.0) fixes the app's own handlers when it makes it: one added is not asked."""

    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except ServiceError as error:
            return Response(error.body(), status_code=error.status, media_type=JSON)

    return answer


async def _read(request: Any, kind: type[T]) -> T:
    return read_json(await _body(request), kind)


async def _body(request: Any) -> bytes:
    """Raises: ServiceError where it is no JSON by its own account, or too large.

    A page of another origin can send text without being asked, and JSON not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON:
        raise ServiceError(415, f"expected content-type {JSON}, got {kind or 'none'}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ServiceError(413, f"a request has at most {MAX_BODY_BYTES} bytes")
    return bytes(body)


class _Lines(StreamingResponse):
    """NDJSON. However it ends, so does what makes the lines: nothing is generated for a client that has gone."""

    def __init__(self, groups: AsyncGenerator[RolloutLine, None]) -> None:
        self._groups = groups
        super().__init__(self._encoded(), media_type=NDJSON)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with aclosing(self._groups):
            await super().__call__(scope, receive, send)

    async def _encoded(self) -> AsyncGenerator[bytes, None]:
        async for line in self._groups:
            yield msgspec.json.encode(line) + b"\n"
