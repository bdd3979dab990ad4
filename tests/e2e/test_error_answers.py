"""Each kind of mistake has one answer, on every route, streamed or not, and one line of the log."""

import re
from typing import Any

import httpx
import pytest

from tests.e2e.servers import Server

CHAT, BATCH, TEXT = "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
INVOCATIONS, SCORE = "/invocations", "/v1/refusal/score"
USER = [{"role": "user", "content": "What is the capital of France?"}]
TURNS = {"model": "demo", "messages": USER, "max_tokens": 4}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: TURNS,
    BATCH: {**TURNS, "messages": [USER, USER]},
    TEXT: {"model": "demo", "prompt": "Hi", "max_tokens": 4},
    RESPONSES: {"model": "demo", "input": "Hi"},
    MESSAGES: TURNS,
    COUNT: TURNS,
    INVOCATIONS: TURNS,
    SCORE: {"inputs": [{"messages": USER}]},
}
STREAMING = [CHAT, TEXT, RESPONSES, MESSAGES]
PROMPTS = {TEXT: "prompt", RESPONSES: "input", SCORE: "inputs"}
JSON = {"content-type": "application/json"}


def ask(server: Server, path: str, **options: Any) -> tuple[httpx.Response, list[str]]:
    """Sends a request; returns the answer, and what the server has logged meanwhile."""
    before = server.log.stat().st_size
    answer = server.http.post(path, **options)
    server.http.get("/healthz")
    lines = server.log.read_bytes()[before:].decode().splitlines()
    quiet = [line for line in lines if "/healthz" not in line and "throughput" not in line]
    return answer, quiet


def told(answer: httpx.Response, path: str) -> dict[str, Any]:
    """Returns the error of an answer in the shape of the route's API."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    error: dict[str, Any] = body["error"]
    if path.startswith(MESSAGES):
        assert body.keys() == {"type", "error"}
        assert error.keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert list(error) == ["message", "type", "param", "code"]
        assert re.fullmatch(r"[a-z_]+", error["code"])
        assert not str(error["param"]).startswith("body")
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 600
    return error


def mistakes() -> list[tuple[str, str, dict[str, Any], int, str]]:
    rows: list[tuple[str, str, dict[str, Any], int, str]] = []
    for path, good in GOOD.items():
        field = PROMPTS.get(path, "messages")
        kind = "invalid_request_error"
        wrong = {**good, field: {"a": 1}}
        missing = {name: value for name, value in good.items() if name != field}
        refusal = {**good, "refusal": {"categories": {"bogus": 1}}}
        rows += [
            ("no JSON", path, {"content": b"{", "headers": JSON}, 400, kind),
            ("no object", path, {"content": b"[]", "headers": JSON}, 400, kind),
            ("wrong type", path, {"json": wrong}, 400, kind),
            ("missing field", path, {"json": missing}, 400, kind),
            ("another field of vLLM's", path, {"json": {**good, "chat_template": "x"}}, 400, kind),
        ]
        if path != INVOCATIONS:  # vLLM's route takes any name for its one model
            unknown = {**good, "model": "nope"}
            rows.append(("unknown model", path, {"json": unknown}, 404, "not_found_error"))
        if path in (CHAT, BATCH):
            turn = {"role": "user", "content": [{"type": "other", "text": "Hi"}]}
            messages = [[turn]] if path == BATCH else [turn]
            rows.append(("unknown part", path, {"json": {**good, field: messages}}, 400, kind))
        if path != COUNT:  # nothing is decided there
            rows.append(("wrong dial", path, {"json": refusal}, 422, kind))
        text = {"content": b"{}", "headers": {"content-type": "text/plain"}}
        rows.append(("another media type", path, text, 415, kind))
    return rows


@pytest.mark.parametrize(
    ("path", "options", "status", "kind"),
    [row[1:] for row in mistakes()],
    ids=[f"{name} {path}" for name, path, *_ in mistakes()],
)
def test_mistake_has_one_status_one_shape_and_one_line_of_log(
    server: Server, path: str, options: dict[str, Any], status: int, kind: str
) -> None:
    answer, log = ask(server, path, **options)
    assert answer.status_code == status, answer.text
    assert told(answer, path)["type"] == kind
    assert len(log) == 1, log
    assert f'"POST {path} HTTP/1.1" {status}' in log[0]


CATEGORIES = ("safety", "humanizing", "incomplete", "indeterminate", "unsupported")
ANSWERED = {"categories": dict.fromkeys(CATEGORIES, "never")}
REFUSED = {"categories": dict.fromkeys(CATEGORIES, "always")}
REJECTED: dict[str, dict[str, Any]] = {
    "too long a prompt": {"prompt": [300] * 511},
    "unknown id": {"allowed_token_ids": [99_999_999]},
    "number of too many bits": {"top_k": "9" * 30},
    "no place for the decision": {"add_generation_prompt": False},
    "regular expression": {"structured_outputs": {"regex": "("}, "refusal": ANSWERED},
    # A refusal drops these fields.
    "unknown id, refused": {"allowed_token_ids": [99_999_999], "refusal": REFUSED},
    "regular expression, refused": {"structured_outputs": {"regex": "("}, "refusal": REFUSED},
    "schema": {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}},
    "stop sequence": {"stop_sequences": [5]},
}
ON = {
    CHAT: [
        "unknown id",
        "number of too many bits",
        "no place for the decision",
        "regular expression",
        "unknown id, refused",
        "regular expression, refused",
    ],
    TEXT: ["too long a prompt", "unknown id", "number of too many bits", "regular expression"],
    RESPONSES: ["schema"],
    MESSAGES: ["stop sequence"],
}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [(path, name) for path, names in ON.items() for name in names],
    ids=lambda value: str(value),
)
def test_stream_that_is_rejected_is_the_same_error_as_without_a_stream(
    server: Server, path: str, wrong: str
) -> None:
    body = {**GOOD[path], **REJECTED[wrong]}
    whole, _ = ask(server, path, json=body)
    streamed, log = ask(server, path, json={**body, "stream": True})
    assert whole.status_code == streamed.status_code == 400, streamed.text
    assert told(streamed, path) == told(whole, path)
    assert len(log) == 1, log


@pytest.mark.parametrize("path", STREAMING)
def test_long_prompt_is_rejected_in_one_way_streamed_or_not(server: Server, path: str) -> None:
    field = PROMPTS.get(path, "messages")
    turns = [{"role": "user", "content": "word " * 800}]
    body = {**GOOD[path], field: "word " * 800 if path in PROMPTS else turns}
    for stream in (False, True):
        answer, log = ask(server, path, json={**body, "stream": stream})
        assert answer.status_code == 400, answer.text
        error = told(answer, path)
        if path != MESSAGES:
            assert (error["code"], error["param"]) == ("context_length_exceeded", field)
        assert len(log) == 1, log


@pytest.mark.parametrize("path", STREAMING)
def test_stream_of_an_answer_is_still_a_stream(server: Server, path: str) -> None:
    answer, _ = ask(server, path, json={**GOOD[path], "stream": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "error" not in answer.text
