"""Errors of all kinds on connections that clients keep: no request behind one is lost."""

from collections.abc import Iterator
from contextvars import ContextVar
from http.client import HTTPConnection

import pytest
from starlette.types import Receive, Scope, Send

from tests.server.failing import CHAT, KINDS, answers, expected, failing_app
from tests.server.wires import connect, listening, until_closed

REQUESTS = 2002
SEEN: ContextVar[str] = ContextVar("seen", default="nothing")
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer tenant\r\n".encode()


@pytest.fixture(scope="module")
def impatient() -> Iterator[int]:
    with listening(failing_app(), body_timeout_s=0.2) as port:
        yield port


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(failing_app()) as port:
        yield port


def test_no_request_behind_an_error_is_lost(port: int) -> None:
    assert answers(f"http://127.0.0.1:{port}", REQUESTS) == expected(REQUESTS)


@pytest.mark.parametrize("how", ["raises", "never answers", "500", "503"])
def test_error_of_the_servers_closes_and_says_so(port: int, how: str) -> None:
    body = KINDS[how].content()
    with connect(port) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        received = until_closed(connection)
    assert received.startswith(f"HTTP/1.1 {KINDS[how].status} ".encode())
    assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize("how", ["ok", "422", "raises after its answer", "no JSON"])
def test_other_answers_keep_the_connection(port: int, how: str) -> None:
    kind = KINDS[how]
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(3):
        connection.request("POST", CHAT, body=kind.content(), headers=kind.headers)
        answer = connection.getresponse()
        answer.read()
        assert (answer.status, answer.will_close) == (kind.status, False)
    connection.close()


def test_body_that_stops_short_is_408_and_the_end(impatient: int) -> None:
    with connect(impatient) as begun, connect(impatient) as missing:
        begun.sendall(HEAD + b"content-length: 9\r\n\r\n{")
        missing.sendall(HEAD + b"content-length: 9\r\n\r\n")
        for received in (until_closed(begun), until_closed(missing)):
            assert received.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nconnection: close\r\n" in received
            assert b"within 0.2 s (RHEOSTAT_BODY_TIMEOUT_S)" in received


def test_body_that_stops_short_behind_another_request_is_408(impatient: int) -> None:
    whole = KINDS["422"].content()
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(whole) + whole)
        assert connection.recv(65536).startswith(b"HTTP/1.1 422 ")
        connection.sendall(HEAD + b"content-length: 9\r\n\r\n{")
        assert b"HTTP/1.1 408 " in until_closed(connection)


def test_body_that_comes_in_drops_is_408(impatient: int) -> None:
    received = b""
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        connection.settimeout(0.02)
        for _ in range(900):
            try:
                connection.sendall(b" ")
                if received := connection.recv(65536):
                    break
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408 ")


async def _remembering(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers what an earlier request set, and sets something while it answers."""
    body = SEEN.get().encode()
    token = SEEN.set("another request's")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
    SEEN.reset(token)


def test_request_begins_without_the_variables_of_the_one_before() -> None:
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with listening(_remembering) as port, connect(port) as connection:
        connection.sendall(request + request + last)
        received = until_closed(connection)
    assert received.count(b"nothing") == 3
