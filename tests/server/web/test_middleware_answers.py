"""What becomes of vLLM's answers, whole and streamed."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.apis.turns import MESSAGES, RESPONSES
from server.context import DECISION_CONTEXT, Decision
from server.web.errors import Failure
from tests.server.middlewares import (
    ANSWERED,
    CHAT,
    COMPLETIONS,
    USER,
    FakeServer,
    Parts,
    scope_of,
    send_to,
    steering_app,
)
from tests.server.recordings import RECORDED, events_of

REFUSED = {(0, 0): Decision(0)}
RESPONDED = {(0, 0): Decision(None)}


def chat_answer(content: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@pytest.mark.parametrize("split", [0, 1, 30, 60])
def test_refused_answer_is_shaped_and_its_length_is_right(split: int) -> None:
    whole = chat_answer("I can't — sorry.")
    server = FakeServer(REFUSED, [whole[:split], whole[split:]])
    answer = send_to(server, CHAT, {"messages": [USER]})
    assert answer.json()["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": "I can't — sorry.",
        "refusal_category": "safety",
    }
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["x-request-id"] == "7"
    assert answer.headers["x-refusal-decision"] == "refuse"
    assert answer.headers["x-refusal-category"] == "safety"


def test_what_vllm_answers_to_a_client_that_has_gone_passes() -> None:
    answer = send_to(FakeServer(REFUSED, [b"null"]), CHAT, {"messages": [USER]})
    assert (answer.status_code, answer.content) == (200, b"null")


def test_answer_passes_byte_for_byte_with_the_decision_in_its_headers() -> None:
    whole = b'{ "object":"chat.completion" , "choices":[]}'
    server = FakeServer(RESPONDED, [whole[:9], whole[9:]])
    answer = send_to(server, CHAT, {"messages": [USER]})
    assert answer.content == whole
    assert answer.headers["x-refusal-decision"] == "respond"
    assert answer.headers["x-refusal-category"] == "none"


def test_answer_without_a_decision_has_no_decision_headers() -> None:
    answer = send_to(FakeServer(), CHAT, {"messages": [USER]})
    assert not [name for name in answer.headers if name.startswith("x-refusal")]


@pytest.mark.parametrize("status", [400, 404, 500])
def test_error_of_vllm_says_no_decision(status: int) -> None:
    server = FakeServer(REFUSED, [b'{ "error": {"message": "x"} }'], status=status)
    answer = send_to(server, CHAT, {"messages": [USER]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, "x")
    assert "x-refusal-decision" not in answer.headers


def test_other_media_types_pass_as_they_are() -> None:
    server = FakeServer(REFUSED, [b"plain"], media_type="text/plain")
    assert send_to(server, CHAT, {"messages": [USER]}).content == b"plain"


def test_echo_given_as_a_word_leaks_no_control_token() -> None:
    server = FakeServer(RESPONDED, [chat_answer("[respond]Once")])
    answer = send_to(server, CHAT, {"messages": [USER, ANSWERED], "echo": "true"})
    assert answer.json()["choices"][0]["message"]["content"] == "Once"


def test_reports_of_several_prompts_use_the_requests_n() -> None:
    decisions = {(c, i): Decision(None, (10.0 * c + i, 0.0)) for c in (0, 1) for i in (0, 1)}
    choices = [{"index": i, "text": "x"} for i in range(4)]
    raw = json.dumps({"object": "text_completion", "choices": choices}).encode()
    body = {"prompt": ["a", "b"], "n": 2, "refusal": {"report": True}}
    answer = send_to(FakeServer(decisions, [raw]), COMPLETIONS, body)
    margins = [
        choice["refusal_report"]["decisions"]["safety"]["margin"]
        for choice in answer.json()["choices"]
    ]
    assert margins == [0.0, 1.0, 10.0, 11.0]


# streams


def event(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    value = {"object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


STREAM = (
    event(role="assistant", content="")
    + b": keep-alive\n\n"
    + event(content="Nö ")
    + event(content="data: {\n\n")
    + b'data: {"object": "chat.completion.chunk", "choices": [], "usage": {"n": 1}}\n\n'
    + b"data: [DONE]\n\n"
)


def stream_through(
    parts: Parts, decisions: dict[tuple[int, int], Decision], **body: Any
) -> httpx.Response:
    server = FakeServer(decisions, parts, media_type="text/event-stream; charset=utf-8")
    return send_to(server, CHAT, {"messages": [USER], "stream": True, **body})


def test_refused_stream_is_shaped_event_by_event() -> None:
    events = stream_through([STREAM], REFUSED).content.split(b"\n\n")
    values = [json.loads(e[6:]) for e in events if e.startswith(b"data: {")]
    assert [v["choices"][0]["delta"] for v in values if v["choices"]] == [
        {"role": "assistant", "content": None, "refusal": "", "refusal_category": "safety"},
        {"content": None, "refusal": "Nö "},
        {"content": None, "refusal": "data: {\n\n"},
    ]
    assert values[-1]["usage"] == {"n": 1}
    assert events[1] == b": keep-alive"
    assert events[-2:] == [b"data: [DONE]", b""]


def test_stream_split_anywhere_is_shaped_the_same() -> None:
    expected = stream_through([STREAM], REFUSED).content
    for split in range(len(STREAM) + 1):
        parts = [STREAM[:split], STREAM[split:]]
        assert stream_through(parts, REFUSED).content == expected, split


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_stream_in_pieces_of_any_size_is_shaped_the_same(size: int) -> None:
    parts = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert stream_through(parts, REFUSED).content == stream_through([STREAM], REFUSED).content
    assert stream_through([*parts, b""], REFUSED).content == (
        stream_through([STREAM], REFUSED).content
    )


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_answered_stream_passes_byte_for_byte(size: int) -> None:
    odd = STREAM + b"data: unfinished"
    parts = [odd[start : start + size] for start in range(0, len(odd), size)]
    assert stream_through(parts, RESPONDED).content == odd


def test_events_are_sent_as_they_come_and_not_at_the_end() -> None:
    sent: list[tuple[bytes, bool]] = []
    first, second = event(content="a"), event(content="b")
    server = FakeServer(
        REFUSED, [first, second[:10], second[10:], b""], media_type="text/event-stream"
    )

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.body":
            sent.append((message["body"], message.get("more_body", False)))

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"messages": []}', "more_body": False}

    asyncio.run(steering_app(server)(scope_of(CHAT), receive, collect))
    assert [body.count(b"data: ") for body, _ in sent] == [1, 1, 0]
    assert [more for _, more in sent] == [True, True, False]


def test_stream_with_report_carries_it_once() -> None:
    content = stream_through(
        [STREAM], {(0, 0): Decision(None, (1.0, -1.0))}, refusal={"report": True}
    ).content
    assert content.count(b"refusal_report") == 1


@pytest.mark.parametrize(
    ("path", "name"), [(RESPONSES, "response_refused"), (MESSAGES, "message_refused")]
)
@pytest.mark.parametrize("size", [50, 10_000])
def test_named_events_of_a_refusal_are_shaped_and_stay_named(
    path: str, name: str, size: int
) -> None:
    raw = (RECORDED / f"{name}.sse").read_bytes()
    parts = [raw[start : start + size] for start in range(0, len(raw), size)]
    server = FakeServer(REFUSED, parts, media_type="text/event-stream")
    answer = send_to(server, path, {"stream": True})
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    for block in blocks:
        first, second = block.split("\n")
        assert first == f"event: {json.loads(second.removeprefix('data: '))['type']}"
    assert '"refusal"' in answer.text
    assert "harm people" not in answer.text, "vLLM's own text events were passed on"


@pytest.mark.parametrize("name", ["response_answered", "message_answered"])
def test_named_events_of_an_answer_pass_byte_for_byte(name: str) -> None:
    raw = (RECORDED / f"{name}.sse").read_bytes()
    server = FakeServer(RESPONDED, [raw[:99], raw[99:]], media_type="text/event-stream")
    assert send_to(server, RESPONSES, {"stream": True}).content == raw


# streams that the engine rejects

TOO_LONG = Failure(400, "the prompt is too long", "messages", "context_length_exceeded")
SHAPED = {
    "message": "the prompt is too long",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
VLLMS = b'data: {"error": {"message": "(parameter=x)", "type": "BadRequestError", "code": 400}}'


def opening_of(name: str, first: bytes) -> bytes:
    raw = (RECORDED / f"{name}.sse").read_bytes()
    return raw[: raw.index(first)]


RESPONSE_OPENING = opening_of("response_answered", b"event: response.output_item.added")
REJECTED = [
    (CHAT, [VLLMS + b"\n\n", b"data: [DONE]\n\n"]),
    (COMPLETIONS, [VLLMS + b"\n\n"]),
    (RESPONSES, [RESPONSE_OPENING[:400], RESPONSE_OPENING[400:]]),
    (MESSAGES, [b'event: error\ndata: {"type":"error","error":{"type":"internal_error"}}\n\n']),
    (CHAT, [b""]),
]


@pytest.mark.parametrize(("path", "parts"), REJECTED, ids=[path for path, _ in REJECTED])
def test_stream_that_the_engine_rejects_is_an_error_with_its_status(
    path: str, parts: Parts
) -> None:
    server = FakeServer({}, parts, media_type="text/event-stream", failure=TOO_LONG)
    answer = send_to(server, path, {"stream": True})
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.json() == TOO_LONG.body(path)


def test_first_event_that_is_an_error_has_its_status_too() -> None:
    vllms = b'data: {"error": {"message": "no parser", "param": "tools", "code": 501}}\n\n'
    server = FakeServer({}, [vllms], media_type="text/event-stream")
    answer = send_to(server, CHAT, {"stream": True})
    assert (answer.status_code, answer.json()["error"]["type"]) == (501, "server_error")


def test_what_the_engine_rejects_is_told_as_it_said_it() -> None:
    raw = b'{"error": {"message": "m (parameter=messages)", "code": 422}}'
    server = FakeServer({}, [raw], status=422, failure=TOO_LONG)
    answer = send_to(server, MESSAGES, {})
    assert (answer.status_code, answer.json()) == (400, TOO_LONG.body(MESSAGES))


class Connection:
    """Collects what is sent while a server behind the middleware says when the engine starts."""

    def __init__(self, *steps: bytes | bool, failure: Failure | None = None) -> None:
        self.steps = steps
        self.failure = failure
        self.sent: list[Message] = []
        self.seen: list[int] = []

    async def server(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = DECISION_CONTEXT.get()
        assert context is not None
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for step in self.steps:
            if isinstance(step, bool):
                context.started = True
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
            self.seen.append(len(self.sent))
        context.failure = self.failure
        await send({"type": "http.response.body", "body": VLLMS + b"\n\n" if self.failure else b""})

    def serve(self, path: str) -> list[Message]:
        async def receive() -> Message:
            return {"type": "http.request", "body": b'{"stream": true}', "more_body": False}

        async def send(message: Message) -> None:
            self.sent.append(message)

        asyncio.run(steering_app(self.server)(scope_of(path), receive, send))
        return self.sent


def test_stream_begins_with_the_engines_first_output_and_is_held_no_longer() -> None:
    first, second = b'data: {"a": 1}\n\n', b'data: {"b": 1}\n\n'
    connection = Connection(first, True, second, b"data: [DONE]\n\n")
    start, *bodies = connection.serve(RESPONSES)
    assert start["status"] == 200
    assert connection.seen == [0, 0, 2, 3]
    assert [message["body"] for message in bodies] == [first + second, b"data: [DONE]\n\n", b""]


def test_comment_that_keeps_a_connection_alive_is_not_held() -> None:
    comment = b": keep-alive\n\n"
    connection = Connection(comment, comment, failure=TOO_LONG)
    start, *bodies = connection.serve(CHAT)
    assert connection.seen == [2, 3]
    assert start["status"] == 200
    assert bodies[0]["body"] == comment
    assert events_of(bodies[-1]["body"].decode()) == [{"error": SHAPED}]


def test_stream_without_any_output_ends_as_vllm_ends_it() -> None:
    start, *bodies = Connection(b"data: [DONE]\n\n").serve(CHAT)
    assert (start["status"], b"".join(m["body"] for m in bodies)) == (200, b"data: [DONE]\n\n")


def test_error_after_the_first_output_is_an_event_of_the_api() -> None:
    *_, last = Connection(True, b"data: {}\n\n", failure=TOO_LONG).serve(CHAT)
    assert events_of(last["body"].decode()) == [{"error": SHAPED}]
    *_, last = Connection(True, b"data: {}\n\n", failure=TOO_LONG).serve(MESSAGES)
    told = {"type": "invalid_request_error", "message": "the prompt is too long"}
    assert events_of(last["body"].decode()) == [{"type": "error", "error": told}]


class BreakingServer(FakeServer):
    """Fails after its parts, as starlette does where an error has an answer but comes too late."""

    def __init__(
        self, parts: Parts, media_type: str, late: Failure | None = None, *, started: bool = False
    ) -> None:
        super().__init__({}, parts, media_type=media_type)
        self.late = late
        self.started = started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unfinished(message: Message) -> None:
            assert self.context is not None
            self.context.started = self.started
            await send({**message, "more_body": True})

        await super().__call__(scope, receive, unfinished)
        assert self.context is not None
        self.context.failure = self.late
        cause = ValueError("vLLM's own")
        raise RuntimeError("Caught handled exception, but response already started.") from cause


def test_stream_of_responses_that_fails_ends_with_its_error_event() -> None:
    server = BreakingServer([RESPONSE_OPENING], "text/event-stream", TOO_LONG, started=True)
    answer = send_to(server, RESPONSES, {"input": "x", "stream": True})
    *_, last = events_of(answer.text)
    assert answer.content.startswith(RESPONSE_OPENING)
    assert last == {**SHAPED, "type": "error", "param": "input", "sequence_number": 2}


def test_stream_of_responses_that_the_engine_rejects_does_not_begin() -> None:
    server = BreakingServer([RESPONSE_OPENING], "text/event-stream", TOO_LONG)
    answer = send_to(server, RESPONSES, {"input": "x", "stream": True})
    assert (answer.status_code, answer.json()) == (400, TOO_LONG.body(RESPONSES))


def test_other_failures_of_a_server_are_no_concern_of_ours() -> None:
    for path, media_type in ((CHAT, "text/event-stream"), (RESPONSES, "application/json")):
        with pytest.raises(RuntimeError, match="already started"):
            send_to(BreakingServer([b""], media_type), path, {"input": "x"})
