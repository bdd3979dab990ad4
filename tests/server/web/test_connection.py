import asyncio
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from starlette.types import Receive, Scope, Send

from server.web.connection import MOST_HEAD_BYTES
from tests.server.wires import connect, listening, until_closed

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
SOON_S = 0.2


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the headers and of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    head = sum(len(name) + len(value) for name, value in scope["headers"])
    await answer(send, f"{head} {size}".encode())


async def answer(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(count) as port:
        yield port


@pytest.fixture(scope="module")
def impatient() -> Iterator[int]:
    with listening(count, head_timeout_s=SOON_S, idle_timeout_s=SOON_S) as port:
        yield port


def answered(port: int, *requests: tuple[str, bytes]) -> list[bytes]:
    """Returns the bodies of the answers to headers and bodies, sent on one connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    bodies = []
    for header, body in requests:
        connection.request("POST", "/", body=body, headers={"l": header})
        response = connection.getresponse()
        assert response.status == 200
        bodies.append(response.read())
    connection.close()
    return bodies


def test_head_within_the_bound_and_any_body_pass_on_one_connection(port: int) -> None:
    large = b"x" * (3 * MOST_HEAD_BYTES)
    answers = answered(port, ("a" * 50_000, large), ("b" * 50_000, b""), ("", b"x"))
    heads, sizes = zip(*(map(int, body.split()) for body in answers), strict=True)
    assert sizes == (len(large), 0, 1)
    assert heads[0] > 50_000
    assert heads[2] < 200


def test_head_without_an_end_is_cut_off(port: int) -> None:
    piece, most, sent = b"a" * 65536, 1024, 0
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nL: ")
        try:
            for _ in range(most):
                connection.sendall(piece)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < most
    assert answered(port, ("a", b""))


def test_half_a_head_is_408_and_the_end(impatient: int) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEAD)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in received
    assert b'"message":"the request\'s head did not come within 0.2 s"' in received


def test_head_in_drops_is_as_late_as_half_a_head(impatient: int) -> None:
    received = b""
    with connect(impatient) as connection:
        connection.settimeout(SOON_S / 10)
        for byte in b"GET / HTTP/1.1\r\nA: " + b"a" * 1000:
            try:
                connection.sendall(bytes([byte]))
                if received := connection.recv(65536):
                    break
            except TimeoutError:
                continue
    assert received.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("said", [b"", b"\r\n", b"\r\n" * 9])
def test_connection_that_asks_nothing_is_closed(impatient: int, said: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(said)
        until_closed(connection)


@pytest.mark.parametrize("said", [b"", b"\r\n", HEAD])
def test_idle_connection_is_closed_whatever_was_said_after_the_answer(
    impatient: int, said: bytes
) -> None:
    client = HTTPConnection("127.0.0.1", impatient, timeout=30)
    client.request("POST", "/")
    assert client.getresponse().read().endswith(b" 0")
    with client.sock as connection:
        connection.sendall(said)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 408 ") == (said == HEAD)


def test_long_answer_is_not_cut_off_by_a_request_behind_it() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10):
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            await asyncio.sleep(SOON_S / 4)
        await send({"type": "http.response.body", "body": b"end"})

    serving = listening(slow, head_timeout_s=SOON_S, idle_timeout_s=SOON_S)
    with serving as port, connect(port) as connection:
        connection.sendall(HEAD + b"content-length: 0\r\n\r\n")
        assert connection.recv(65536)
        connection.sendall(b"\r\n" + HEAD)
        received = until_closed(connection)
    assert received.count(b"part") >= 9
    assert received.endswith(b"end\r\n0\r\n\r\n")


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "nonsense"])
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_request_for_an_upgrade_is_answered_as_any_other(
    port: int, method: str, upgrade: str, body: bytes
) -> None:
    head = f"{method} / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    with connect(port) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in received
    assert received.endswith(f" {len(body)}".encode())


def test_body_after_a_head_that_asks_for_an_upgrade_is_read(port: int) -> None:
    # As Java's client sends it, in two packets; and a request behind it.
    head = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n"
    with connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in (HEAD + head, b"\r\n", b"3\r\nabc\r\n", b"2\r\nde\r\n0\r\n\r\n" + HEAD):
            connection.sendall(part)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b" 5")


def test_proxying_is_none_of_ours(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\n")
        assert until_closed(connection).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_is_400_in_the_shape_of_errors(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'{"error":{"message":"Invalid HTTP request received."' in received


def test_server_ends_while_bodies_are_missing() -> None:
    with listening(count) as port:
        connection = connect(port)
        connection.sendall(HEAD + b"content-length: 9\r\n\r\nhalf")
        waiting = connect(port)
        waiting.sendall(HEAD)
        answered(port, ("", b""))
    with connection, waiting:
        assert until_closed(connection) == b""
        assert until_closed(waiting) == b""


def test_server_ends_while_a_client_does_not_read() -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

    with listening(endless) as port:
        connection = connect(port)
        connection.sendall(HEAD + b"content-length: 0\r\n\r\n")
        assert connection.recv(1)
    connection.close()


def test_answer_before_the_end_of_the_body_closes_and_reaches_the_client() -> None:
    async def deny(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"denied", 401)

    with listening(deny) as port, connect(port) as connection:
        connection.sendall(HEAD + b"content-length: 50000000\r\n\r\n" + b"x" * 10_000_000)
        connection.sendall(b"x" * 40_000_000)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in received
    assert received.endswith(b"denied")


def test_client_that_waits_to_continue_is_not_asked_to() -> None:
    async def deny(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"denied", 401)

    with listening(deny) as port, connect(port) as connection:
        connection.sendall(HEAD + b"content-length: 9\r\nexpect: 100-continue\r\n\r\n")
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in received
    assert received.endswith(b"denied")


@pytest.mark.parametrize(
    "rest",
    [
        b"Transfer-Encoding: unknown\r\n\r\nx",
        b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n",
    ],
)
def test_body_that_is_no_http_is_400(port: int, rest: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(HEAD + rest)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1") == 1


def test_body_that_is_no_http_stands_in_no_other_answer() -> None:
    async def begin(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    wrong = HEAD + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n"
    with listening(begin) as port:
        for requests in (wrong, HEAD + b"Content-Length: 0\r\n\r\n" + wrong):
            with connect(port) as connection:
                connection.sendall(requests[: -len(b"no size\r\n")])
                received = b""
                while b"begun" not in received:
                    received += connection.recv(65536)
                connection.sendall(b"no size\r\n")
                assert b"HTTP/1.1" not in until_closed(connection)


def test_client_that_takes_nothing_of_its_answer_is_not_waited_for() -> None:
    ended = threading.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    with listening(endless, send_timeout_s=SOON_S) as port, connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ended.wait(30)
