"""The client against servers that do not behave."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from rollout.service.client import RequestFailed, ServiceClient, ServiceUnreachable
from rollout.service.protocol import FailedGroup, Prompt

FAILED = b'{"type":"failed","index":0,"error":{"message":"m","type":"t","code":500}}\n'
FINISHED = b'{"type":"finished","groups":1,"failed":1}\n'


def answer(status: str, body: bytes, length: int | None = None) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], ServiceClient]]:
    """bytes -> a client of a server that says just that to its first request."""
    made: list[tuple[socket.socket, ServiceClient, threading.Thread]] = []

    def make(said: bytes) -> ServiceClient:
        listening = socket.create_server(("127.0.0.1", 0))

        def run() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        made.append((listening, ServiceClient(f"http://127.0.0.1:{listening.getsockname()[1]}"), thread))
        return made[-1][1]

    yield make
    for listening, client, thread in made:
        client.close()
        listening.close()
        thread.join(10.0)


def groups(client: ServiceClient) -> list[object]:
    return list(client.rollouts([Prompt(text="1")], max_tokens=1))


def test_lines_until_it_is_finished(serve: Callable[[bytes], ServiceClient]) -> None:
    (failed,) = groups(serve(answer("200 OK", FAILED + FINISHED)))
    assert isinstance(failed, FailedGroup)


@pytest.mark.parametrize("length", [len(FAILED), 1000])
def test_an_answer_that_is_cut_off_is_no_answer(serve: Callable[[bytes], ServiceClient], length: int) -> None:
    with pytest.raises(ServiceUnreachable):
        groups(serve(answer("200 OK", FAILED, length)))


def test_errors_are_the_services_own(serve: Callable[[bytes], ServiceClient]) -> None:
    body = b'{"error":{"message":"no such reward","type":"BadRequestError","param":"reward","code":400}}'
    with pytest.raises(RequestFailed, match="400: no such reward") as caught:
        groups(serve(answer("400 Bad Request", body)))
    assert caught.value.fields.param == "reward"


def test_an_error_of_something_else_in_between(serve: Callable[[bytes], ServiceClient]) -> None:
    with pytest.raises(RequestFailed, match="502: <html> bad gateway"):
        serve(answer("502 Bad Gateway", b"<html>\n bad gateway")).weights()


def test_what_is_no_service_is_said(serve: Callable[[bytes], ServiceClient]) -> None:
    with pytest.raises(ServiceUnreachable, match="is no `echelon serve`"):
        serve(answer("200 OK", b"hello")).weights()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with ServiceClient(f"http://127.0.0.1:{port}") as client:
        assert not client.is_ready()
        with pytest.raises(ServiceUnreachable, match=f"cannot reach http://127.0.0.1:{port}"):
            client.weights()
