import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server.http_head import MOST_HEAD_BYTES, BoundedHead


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the headers and of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    head = sum(len(name) + len(value) for name, value in scope["headers"])
    body = f"{head} {size}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(count, http=BoundedHead, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        chosen: int = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield chosen
        server.should_exit = True
        thread.join(timeout=30)


def answered(port: int, *requests: tuple[str, bytes]) -> list[bytes]:
    """Returns the bodies of the answers to headers and bodies, sent on one connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    bodies = []
    for header, body in requests:
        connection.request("POST", "/", body=body, headers={"l": header})
        answer = connection.getresponse()
        assert answer.status == 200
        bodies.append(answer.read())
    connection.close()
    return bodies


def test_head_within_the_bound_and_any_body_pass_on_one_connection(port: int) -> None:
    large = b"x" * (3 * MOST_HEAD_BYTES)
    answers = answered(port, ("a" * 50_000, large), ("b" * 50_000, b""), ("", b"x"))
    heads, sizes = zip(*(map(int, answer.split()) for answer in answers), strict=True)
    assert sizes == (len(large), 0, 1)
    assert heads[0] > 50_000
    assert heads[2] < 200


def test_head_without_an_end_is_cut_off(port: int) -> None:
    piece, most, sent = b"a" * 65536, 1024, 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nL: ")
        try:
            for _ in range(most):
                connection.sendall(piece)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < most
    assert answered(port, ("a", b""))
