import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message

from models.errors import (
    ContextLengthError,
    ExpiredKeyError,
    NotAllowedError,
    RequestError,
    UnknownCallerError,
)
from server.web.answer import Answer
from server.web.errors import Failure, error_response, failure, failure_in


def through(
    status: int, *parts: bytes, headers: Any = (), path: str = ""
) -> tuple[list[Message], Answer]:
    """Returns what becomes of an answer of vLLM's, message by message."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    answer = Answer(send, path)

    async def pass_on() -> None:
        start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        await answer(start)
        for place, part in enumerate(parts):
            more = place < len(parts) - 1
            await answer({"type": "http.response.body", "body": part, "more_body": more})

    asyncio.run(pass_on())
    return sent, answer


def body_of(status: int, raw: bytes, path: str = "") -> Any:
    (_, sent), _ = through(status, raw, path=path)
    return json.loads(sent["body"])


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
        (400, b'{"error":{"message":"m","type":"BadRequestError","code":400}}', "m"),
        (400, b'{"type":"error","error":{"type":"BadRequestError","message":"m"}}', "m"),
        (400, b'{"error":{"message":"m (parameter=n, value=\\n)"}}', "m"),
        (400, b'{"error":{"message":"one\\ntwo"}}', "one"),
        (400, b'{"error":{"message":"' + b"x" * 700 + b'"}}', "x" * 597 + "..."),
    ],
)
def test_every_error_has_openais_body(status: int, body: bytes, message: str) -> None:
    old = [(b"content-type", b"text/plain"), (b"content-length", b"1"), (b"x-kept", b"1")]
    (start, sent), _ = through(status, body[:3], body[3:], headers=old)
    error = json.loads(sent["body"])["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["message"], error["param"]) == (message, None)
    assert start["status"] == status
    closing = {b"connection": b"close"} if status >= 500 else {}
    assert dict(start["headers"]) == {
        b"content-type": b"application/json",
        b"content-length": str(len(sent["body"])).encode(),
        b"x-kept": b"1",
        **closing,
    }


@pytest.mark.parametrize(
    ("status", "openai", "anthropic", "code"),
    [
        (400, "invalid_request_error", "invalid_request_error", "invalid_request"),
        (401, "authentication_error", "authentication_error", "invalid_request"),
        (403, "permission_error", "permission_error", "invalid_request"),
        (404, "not_found_error", "not_found_error", "not_found"),
        (405, "invalid_request_error", "invalid_request_error", "method_not_allowed"),
        (408, "invalid_request_error", "invalid_request_error", "request_timeout"),
        (413, "invalid_request_error", "request_too_large", "request_too_large"),
        (414, "invalid_request_error", "invalid_request_error", "request_too_large"),
        (415, "invalid_request_error", "invalid_request_error", "unsupported_media_type"),
        (422, "invalid_request_error", "invalid_request_error", "invalid_request"),
        (429, "rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
        (500, "server_error", "api_error", "service_error"),
        (503, "server_error", "api_error", "service_error"),
    ],
)
def test_type_and_code_follow_from_the_status(
    status: int, openai: str, anthropic: str, code: str
) -> None:
    raw = json.dumps({"error": {"message": "m", "type": "t", "param": "n", "code": status}})
    error = {"message": "m", "type": openai, "param": "n", "code": code}
    assert body_of(status, raw.encode()) == {"error": error}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        error = {"type": anthropic, "message": "m"}
        assert body_of(status, raw.encode(), path) == {"type": "error", "error": error}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("m"), "invalid_request"),
        (RequestError("m", status=413), "request_too_large"),
        (UnknownCallerError("m"), "invalid_api_key"),
        (ExpiredKeyError("m"), "expired_api_key"),
        (NotAllowedError("m"), "not_allowed"),
        (ContextLengthError("m"), "context_length_exceeded"),
    ],
)
def test_code_of_an_error_of_ours_reaches_the_client(error: RequestError, code: str) -> None:
    response = error_response(error)
    assert body_of(response.status_code, bytes(response.body))["error"]["code"] == code


@pytest.mark.parametrize(
    ("status", "param", "expected"),
    [
        (400, "body.messages.0.content", ("messages.0.content", "invalid_request")),
        (400, "query.hashes", ("hashes", "invalid_request")),
        (400, "body", ("body", "invalid_request")),
        (404, "model", ("model", "model_not_found")),
        (400, "model", ("model", "invalid_request")),
        (400, "input_tokens", ("messages", "context_length_exceeded")),
    ],
)
def test_path_is_that_of_the_request(status: int, param: str, expected: tuple[str, str]) -> None:
    told = failure(status, "m", param, status)
    assert (told.param, told.code) == expected


@pytest.mark.parametrize(
    ("path", "event"),
    [
        (
            "/v1/chat/completions",
            b'data: {"error":{"message":"m","type":"invalid_request_error","param":"n",'
            b'"code":"invalid_request"}}',
        ),
        (
            "/v1/responses",
            b'event: error\ndata: {"message":"m","type":"error","param":"n",'
            b'"code":"invalid_request","sequence_number":7}',
        ),
        (
            "/v1/messages",
            b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error",'
            b'"message":"m"}}',
        ),
    ],
)
def test_event_of_an_error_is_that_of_its_api(path: str, event: bytes) -> None:
    assert failure(400, "m", "n").event(path, 7) == event


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', None),
        (b'data: {"choices": [{"text": "data: {\\"error\\": 1}"}]}\n\n', None),
        (b'data: {"choices": [{"text": "event: error"}]}\n\n', None),
        (b'data: {"error": {"message": "m", "param": "n", "code": 422}}\n\n', (422, "m", "n")),
        (b'data: {}\n\ndata: {"error": {"message": "m", "code": "c"}}\n\n', (500, "m", None)),
        (b'event: error\ndata: {"error": {"message": "m"}}\n\n', (500, "m", None)),
        (b"event: error\ndata: nothing\n\n", (500, "nothing", None)),
    ],
)
def test_error_among_events_is_found(
    events: bytes, found: tuple[int, str, str | None] | None
) -> None:
    told = failure_in(events)
    assert (None if told is None else told[:3]) == found


def test_answer_knows_what_it_told_of_errors_and_of_nothing_else() -> None:
    assert through(200, b'{"error": {"message": "m"}}')[1].failure is None
    _, answer = through(404, b'{"error": {"message": "m", "param": "model"}}')
    assert answer.failure == Failure(404, "m", "model", "model_not_found")


def test_answers_pass_as_they_come() -> None:
    sent, _ = through(200, b'{"detail":', b'"x"}')
    assert [message.get("body") for message in sent] == [None, b'{"detail":', b'"x"}']
    assert sent[1]["more_body"] is True
