"""Who may come in, and where: what is not named here is not reached, whatever the server behind has.

vLLM has routes that change the engine for everybody, more of them in its development mode: none is named.
"""

import asyncio
from collections import Counter
from typing import Any, Literal

from rollout.service.errors import ServiceError
from rollout.service.keys import Key

Door = Literal["open", "api", "admin"]

DOORS: dict[str, tuple[str, Door]] = {
    "/health": ("GET", "open"),
    "/ready": ("GET", "open"),
    "/metrics": ("GET", "api"),
    "/version": ("GET", "api"),
    "/tokenize": ("POST", "api"),
    "/detokenize": ("POST", "api"),
    "/v1/models": ("GET", "api"),
    "/v1/completions": ("POST", "api"),
    "/v1/chat/completions": ("POST", "api"),
    "/v1/rollouts": ("POST", "api"),
    "/v1/weights": ("GET", "api"),
    "/v1/weights/load": ("POST", "admin"),
    "/v1/weights/follow": ("POST", "admin"),
    "/v1/weights/unfollow": ("POST", "admin"),
}
"""Method and door of each path. open: for those who look whether it lives. admin: with the second key alone."""


class Doors:
    """ASGI: checks path, method and key, and counts those who are inside, and those who are answered with an error."""

    def __init__(self, app: Any, api_key: Key | None, admin_key: Key | None) -> None:
        """Args: api_key: None lets everybody in at `api`. admin_key: None lets nobody in at `admin`."""
        self._app = app
        self._api_key = api_key
        self._admin_key = admin_key
        self.draining = False
        self.inside = 0
        self.cut_off = 0
        self.refused: Counter[int] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            door = self._door(scope["method"], scope["path"])
            self._check_key(door, dict(scope["headers"]).get(b"authorization", b""))
            if self.draining and scope["method"] == "POST":
                raise ServiceError(503, "the service is shutting down", type="ServiceUnavailableError")
        except ServiceError as error:
            self.refused[error.status] += 1
            await _answer(error, send)
            return
        await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.refused[message["status"]] += 1
            await send(message)

        self.inside += 1
        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
        finally:
            self.inside -= 1

    def _door(self, method: str, path: str) -> Door:
        allowed = DOORS.get(path)
        if allowed is None:
            raise ServiceError(404, f"there is no {path} here")
        if method != allowed[0]:
            raise ServiceError(405, f"{path} takes {allowed[0]}, not {method}")
        return allowed[1]

    def _check_key(self, door: Door, authorization: bytes) -> None:
        if door == "open":
            return
        is_admin = self._admin_key is not None and self._admin_key.is_in(authorization)
        is_known = is_admin or self._api_key is None or self._api_key.is_in(authorization)
        if not is_known:
            raise ServiceError(401, "a key is needed: send it as `Authorization: Bearer KEY`")
        if door == "admin" and not is_admin:
            wanted = "the admin key" if self._admin_key else "a service that was started with --admin-key-file"
            raise ServiceError(403, f"this changes what everybody is served: it needs {wanted}")


async def _answer(error: ServiceError, send: Any) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 503:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
