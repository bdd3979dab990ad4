import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from server.error_shape import ErrorShape


def through(status: int, *parts: bytes, headers: Any = ()) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def answer() -> None:
        shape = ErrorShape(send)
        start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await shape(start)
        for place, part in enumerate(parts):
            more = place < len(parts) - 1
            await shape({"type": "http.response.body", "body": part, "more_body": more})

    asyncio.run(answer())
    return sent


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b'{"detail":"Not Found"}', "Not Found"),
        (401, b'{"error":"Unauthorized"}', "Unauthorized"),
        (400, b"Disallowed CORS origin", "Disallowed CORS origin"),
        (503, b"", "the server gave no reason"),
        (500, b"\xff", "\ufffd"),
        (422, b'{"detail":[{"loc":[]}]}', '{"detail":[{"loc":[]}]}'),
        (400, b"[1]", "[1]"),
        (400, b'{"error":{"message":5}}', '{"error":{"message":5}}'),
    ],
)
def test_other_errors_get_openais_body(status: int, body: bytes, message: str) -> None:
    old = [(b"content-type", b"text/plain"), (b"content-length", b"1"), (b"x-kept", b"1")]
    start, sent = through(status, body[:3], body[3:], headers=old)
    kind, code = (
        ("server_error", "service_error")
        if status >= 500
        else (
            "invalid_request_error",
            "invalid_request",
        )
    )
    error = {"message": message, "type": kind, "param": None, "code": code}
    assert json.loads(sent["body"]) == {"error": error}
    assert start["status"] == status
    assert dict(start["headers"]) == {
        b"content-type": b"application/json",
        b"content-length": str(len(sent["body"])).encode(),
        b"x-kept": b"1",
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "m", "type": "t", "param": null, "code": 400}}',
        b'{"type": "error", "error": {"type": "t", "message": "m"}}',
    ],
)
def test_shaped_errors_pass_byte_for_byte(body: bytes) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    start, sent = through(400, body[:9], body[9:], headers=headers)
    assert (start["headers"], sent["body"]) == (headers, body)


def test_answers_pass_as_they_come() -> None:
    sent = through(200, b'{"detail":', b'"x"}')
    assert [message.get("body") for message in sent] == [None, b'{"detail":', b'"x"}']
    assert sent[1]["more_body"] is True
