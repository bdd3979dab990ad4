"""What becomes of vLLM's answers, whole and streamed."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.context import Decision
from server.turns import MESSAGES, RESPONSES
from tests.server.middlewares import (
    ANSWERED,
    CHAT,
    COMPLETIONS,
    USER,
    FakeServer,
    Parts,
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
def test_error_of_vllm_passes_as_it_is(status: int) -> None:
    raw = b'{ "error": {"message": "x"} }'
    server = FakeServer(REFUSED, [raw], status=status)
    answer = send_to(server, CHAT, {"messages": [USER]})
    assert (answer.status_code, answer.content) == (status, raw)
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

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    app = steering_app(server)
    asyncio.run(app(scope, receive, collect))
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


class BreakingServer(FakeServer):
    """Fails after its parts, as starlette does where an error has an answer but comes too late."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unfinished(message: Message) -> None:
            await send({**message, "more_body": True})

        await super().__call__(scope, receive, unfinished)
        cause = ValueError("the prompt is too long")
        raise RuntimeError("Caught handled exception, but response already started.") from cause


def test_stream_of_responses_that_fails_ends_with_its_error_event() -> None:
    raw = (RECORDED / "response_answered.sse").read_bytes()
    opening = raw[: raw.index(b"event: response.output_item.added")]
    server = BreakingServer({}, [opening], media_type="text/event-stream")
    answer = send_to(server, RESPONSES, {"input": "x", "stream": True})
    *_, last = events_of(answer.text)
    assert answer.content.startswith(opening)
    assert last == {
        "type": "error",
        "code": "invalid_request",
        "message": "the prompt is too long",
        "param": None,
        "sequence_number": 2,
    }


def test_other_failures_of_a_server_are_no_concern_of_ours() -> None:
    for path, media_type in ((CHAT, "text/event-stream"), (RESPONSES, "application/json")):
        with pytest.raises(RuntimeError, match="already started"):
            send_to(BreakingServer({}, [b""], media_type=media_type), path, {"input": "x"})
