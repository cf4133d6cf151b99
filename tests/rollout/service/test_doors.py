"""Who is let in, and where."""

import asyncio
import json
from typing import Any

import pytest

from rollout.service.doors import DOORS, Doors
from rollout.service.keys import Key

API, ADMIN = Key(b"the-key-of-all-users"), Key(b"the-key-of-operators")
AS_USER, AS_ADMIN = b"Bearer the-key-of-all-users", b"Bearer the-key-of-operators"
CLOSED = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/pause",
    "/resume", "/update_weights", "/init_weight_transfer_engine", "/start_weight_update", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/scale_elastic_ep", "/server_info", "/invocations",
    "/inference/v1/generate", "/inference/v1/abort_requests", "/v1/responses", "/v1/messages", "/docs", "/openapi.json",
    "/metrics/", "/v1/weights/", "//v1/weights/load", "/V1/weights/load", "/v1/weights/load/..", "",
)  # fmt: skip


def ask(doors: Doors, path: str, method: str = "POST", key: bytes | None = None) -> tuple[int, Any]:
    """(status, error)"""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if key is None else [(b"authorization", key)]
    asyncio.run(doors({"type": "http", "method": method, "path": path, "headers": headers}, None, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body)["error"] if body else None


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def doors() -> Doors:
    return Doors(inside, API, ADMIN)


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_what_is_not_named_is_not_there_whatever_the_key(doors: Doors, path: str, method: str) -> None:
    status, error = ask(doors, path, method, AS_ADMIN)
    assert status == 404
    assert error["type"] == "NotFoundError"


@pytest.mark.parametrize(("path", "method", "door"), [(path, *how) for path, how in DOORS.items()])
def test_keys_open_their_own_doors(doors: Doors, path: str, method: str, door: str) -> None:
    expected = {"open": (200, 200, 200), "api": (401, 200, 200), "admin": (401, 403, 200)}[door]
    given = (None, AS_USER, AS_ADMIN)
    assert tuple(ask(doors, path, method, key)[0] for key in given) == expected
    other = "GET" if method == "POST" else "POST"
    assert ask(doors, path, other, AS_ADMIN)[0] == 405


@pytest.mark.parametrize(
    "key", [b"", b"Bearer", b"Bearer ", b"Basic the-key-of-all-users", b"the-key-of-all-users", AS_USER + b"x", b"\xff"]
)
def test_almost_a_key_is_none(doors: Doors, key: bytes) -> None:
    status, error = ask(doors, "/v1/models", "GET", key)
    assert (status, error["code"]) == (401, 401)


def test_without_keys_users_come_in_and_operators_do_not() -> None:
    doors = Doors(inside, None, None)
    assert ask(doors, "/v1/completions")[0] == 200
    status, error = ask(doors, "/v1/weights/load", key=AS_ADMIN)
    assert status == 403
    assert "--admin-key-file" in error["message"]


def test_while_it_drains_nothing_new_begins(doors: Doors) -> None:
    doors.draining = True
    assert ask(doors, "/v1/completions", key=AS_USER)[0] == 503
    assert ask(doors, "/health", "GET")[0] == 200
    assert doors.refused == {503: 1}


@pytest.mark.parametrize("status", [200, 400, 422, 500])
def test_errors_of_what_lies_behind_are_counted(status: int) -> None:
    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    doors = Doors(answering, None, None)
    assert ask(doors, "/v1/completions")[0] == status
    assert doors.refused == ({} if status == 200 else {status: 1})


def test_who_is_cut_off_is_counted() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def scenario() -> Doors:
        doors = Doors(slow, None, None)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        tasks = [asyncio.ensure_future(doors(scope, None, None)) for _ in range(3)]
        await asyncio.sleep(0)
        assert doors.inside == 3
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        tasks[2].cancel()
        return doors

    doors = asyncio.run(scenario())
    assert (doors.cut_off, doors.inside) == (3, 0)


def test_no_websocket(doors: Doors) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(doors({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
