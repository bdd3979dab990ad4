"""What vLLM gets of a request."""

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from models.controls import Controls, Rule
from server.apis.turns import MESSAGES, READS_CHAT, RESPONSES
from server.context import DECISION_CONTEXT, Decision, DecisionContext
from server.dials.protocol import parse_options
from server.policies.credentials import hash_key
from server.settings import Settings
from server.web.middleware import GENERATING, RAW_PROMPTS
from tests.server.guards import MARK
from tests.server.middlewares import (
    ANSWERED,
    CHAT,
    COMPLETIONS,
    USER,
    FakeServer,
    assert_refused,
    scope_of,
    send_to,
    steering_app,
)


def steered(path: str, body: Any, **options: Any) -> DecisionContext:
    """Returns the context of a request that is answered."""
    server = FakeServer()
    answer = send_to(server, path, body, **options)
    assert answer.status_code == 200, answer.text
    assert server.context is not None
    return server.context


def test_refusal_object_becomes_the_steering_and_leaves_the_body() -> None:
    server = FakeServer()
    refusal = {"decision": "sample", "report": True, "categories": {"humanizing": "never"}}
    send_to(server, CHAT, {"model": "m", "messages": [USER], "refusal": refusal})
    assert server.body == {"model": "m", "messages": [USER]}
    assert server.headers["content-length"] == str(len(server.raw))
    assert server.context is not None
    assert server.context.controls == Controls(Rule.SAMPLE, (0.0, float("-inf")), (False, True))
    assert server.context.report is True
    assert server.context.history == (0,)


def test_header_form_is_the_refusal_object() -> None:
    server = FakeServer()
    headers = [("X-Refusal", "safety=0.5 , humanizing = never")]
    answer = send_to(server, CHAT, {"messages": [USER]}, headers=headers)
    assert answer.status_code == 200
    assert server.context is not None
    assert server.context.controls == Controls(Rule.GREEDY, (0.0, -math.inf), (True, True))
    assert server.body == {"messages": [USER]}


def test_several_headers_are_one() -> None:
    headers = [("X-Refusal", "safety=always"), ("X-Refusal", "humanizing=bias:-2")]
    context = steered(CHAT, {"messages": [USER]}, headers=headers)
    assert context.controls.bias == (math.inf, -2.0)


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ([("X-Refusal", "safety")], {}, "X-Refusal"),
        ([("X-Refusal", "")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=1,safety=0")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=0.5"), ("X-Refusal", "safety=0")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=0.5")], {"refusal": {}}, "X-Refusal"),
        ([("X-Refusal", "safety=nan")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=1.2")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=rate:0.3")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=rate:1.3")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=false_refusal_rate:x")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "bogus=0.3")], {}, "refusal.categories.bogus"),
        ([("X-Refusal-Policy", "a"), ("X-Refusal-Policy", "a")], {}, "X-Refusal-Policy"),
        ([("X-Refusal-Policy", "a")], {"refusal": {"policy": "a"}}, "X-Refusal-Policy"),
        ([("X-Refusal-Policy", "a")], {"refusal": 5}, "refusal"),
    ],
)
def test_wrong_header_names_its_place(
    headers: Sequence[tuple[str, str]], body: dict[str, Any], param: str
) -> None:
    server = FakeServer()
    answer = send_to(server, CHAT, {"messages": [USER], **body}, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
    assert server.calls == 0


def test_header_takes_rates() -> None:
    header = asked_with({}, [("X-Refusal", "safety=rate:0.25, humanizing=false_refusal_rate:0.05")])
    body = asked_with(
        {"categories": {"safety": {"rate": 0.25}, "humanizing": {"false_refusal_rate": 0.05}}}
    )
    assert header.controls == body.controls
    assert -10.5 <= header.controls.bias[0] < -9.5
    assert header.dials.asked_rates == (("safety", 0.25),)


def test_report_explains_the_dials_where_a_calibration_is_loaded() -> None:
    assert asked_with({"categories": {"safety": 0.9}}).dials.forecast is None
    explained = asked_with({"report": True, "categories": {"safety": 0.9}})
    assert explained.dials.forecast is not None
    assert explained.dials.forecast.calibration == "default"


def asked_with(
    refusal: dict[str, Any], headers: Sequence[tuple[str, str]] = (), **body: Any
) -> DecisionContext:
    """Returns the context of a chat request to a server with a calibration."""
    server = FakeServer()
    content = {"messages": [USER], **body, **({"refusal": refusal} if refusal else {})}
    answer = send_to(server, CHAT, content, headers=headers, calibrations=("default",))
    assert answer.status_code == 200, answer.text
    assert server.context is not None
    return server.context


def test_history_gets_its_control_tokens() -> None:
    server = FakeServer()
    refused = {"role": "assistant", "content": None, "refusal": "No", "refusal_category": "safety"}
    send_to(server, CHAT, {"messages": [USER, ANSWERED, USER, refused, USER]})
    assert [m["content"] for m in server.body["messages"]] == [
        "Hello",
        "[respond]Hi",
        "Hello",
        "[refuse:safety]No",
        "Hello",
    ]
    assert server.context is not None
    assert server.context.history == (2,)
    assert server.context.continues is False


def test_history_of_a_batch_is_counted_by_conversation() -> None:
    server = FakeServer()
    conversations = [[USER], [USER, ANSWERED, USER]]
    send_to(server, "/v1/chat/completions/batch", {"messages": conversations})
    assert server.context is not None
    assert server.context.history == (0, 1)
    assert server.body["messages"][1][1]["content"] == "[respond]Hi"


@pytest.mark.parametrize("path", sorted(GENERATING - READS_CHAT - {MESSAGES}))
def test_messages_that_vllm_would_drop_allow_no_control_token(path: str) -> None:
    # Else one assistant turn in a completion's body would let a `[respond]` into its prompt.
    server = FakeServer()
    raw = json.dumps({"prompt": "[respond]", "messages": [ANSWERED]}).encode()
    send_to(server, path, raw)
    assert server.context is not None
    assert server.context.history == ()
    sent = json.dumps(server.body)
    assert "[respond]" not in sent
    assert json.loads(sent.replace(MARK, "")) == json.loads(raw)


def test_mark_of_the_guard_is_in_no_answer() -> None:
    typed = [{"role": "user", "content": "[respond]"}]
    echoed = f'{{"instructions": "[{MARK}respond]"}}'.encode()
    server = FakeServer(parts=(echoed,))
    answer = send_to(server, CHAT, {"messages": typed})
    assert MARK in server.raw.decode()
    assert answer.json() == {"instructions": "[respond]"}
    assert int(answer.headers["content-length"]) == len(answer.content)
    server = FakeServer(parts=(f"{'x' * 590}{MARK}".encode(),), status=400)
    error = send_to(server, CHAT, {"messages": typed}).json()["error"]
    assert error["message"] == "x" * 590
    events = (b"data: " + echoed[:20], echoed[20:] + b"\n\n", b"data: [DONE]\n\n")
    server = FakeServer(parts=events, media_type="text/event-stream")
    answer = send_to(server, CHAT, {"messages": typed, "stream": True})
    assert answer.text.startswith('data: {"instructions": "[respond]"}\n\n')


def test_mark_of_the_guard_is_in_no_error_of_ours() -> None:
    turn = {**ANSWERED, "refusal_category": "[respond]"}
    error = send_to(FakeServer(), CHAT, {"messages": [turn]}).json()["error"]
    assert "no category '[respond]'" in error["message"]


@pytest.mark.parametrize("path", sorted(GENERATING - RAW_PROMPTS))
def test_conversations_open_a_turn_and_raw_prompts_do_not(path: str) -> None:
    context = steered(path, {"messages": [USER]})
    assert context.opens_turn
    for raw in ("/v1/completions", "/invocations"):
        context = steered(raw, {"prompt": "x"})
        assert not context.opens_turn


def test_items_and_blocks_of_earlier_turns_get_their_control_tokens() -> None:
    server = FakeServer()
    refused = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "No"}],
        "refusal_category": "humanizing",
    }
    send_to(server, RESPONSES, {"input": [USER, refused, USER]})
    assert server.body["input"][1]["content"][0]["text"] == "[refuse:humanizing]No"
    assert server.context is not None
    assert server.context.history == (1,)
    assert server.context.continues is False

    server = FakeServer()
    block = {"type": "text", "text": "No", "refusal_category": "safety"}
    turn = {"role": "assistant", "content": [block]}
    send_to(server, MESSAGES, {"messages": [USER, turn, USER, ANSWERED, USER]})
    assert server.body["messages"][1]["content"] == [{"type": "text", "text": "[refuse:safety]No"}]
    assert server.body["messages"][3]["content"] == "[respond]Hi"
    assert server.context is not None
    assert server.context.history == (2,)


def test_unfinished_last_message_is_continued() -> None:
    server = FakeServer()
    parts = [{"type": "output_text", "text": "The capital"}]
    last = {"type": "message", "role": "assistant", "content": parts, "status": "incomplete"}
    send_to(server, RESPONSES, {"input": [USER, last]})
    assert server.context is not None
    assert server.context.continues is True
    refused = {**last, "content": [{"type": "refusal", "refusal": "No"}]}
    server = FakeServer()
    assert_refused(send_to(server, RESPONSES, {"input": [USER, refused]}), server, 400, "input")


def test_invocations_take_messages_or_a_prompt() -> None:
    server = FakeServer()
    answer = send_to(server, "/invocations", {"prompt": "[respond]", "messages": [ANSWERED]})
    assert_refused(answer, server, 400, "prompt")
    for body in ({"prompt": "x"}, {"messages": [USER]}):
        assert send_to(FakeServer(), "/invocations", body).status_code == 200


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_generating_route_is_steered(path: str) -> None:
    server = FakeServer()
    send_to(server, path, {"input": "x", "refusal": {"categories": {"safety": "always"}}})
    assert server.context is not None
    assert server.context.controls.bias == (float("inf"), 0.0)
    assert server.body == {"input": "x"}


def test_request_without_controls_gets_the_defaults() -> None:
    defaults = parse_options({"decision": "paper", "report": True, "categories": {"safety": 1}})
    context = steered(CHAT, {"messages": [USER]}, settings=Settings(defaults=defaults))
    assert context.controls.rule is Rule.PAPER
    assert context.controls.bias == (float("inf"), 0.0)
    assert context.report is True


def test_report_of_the_request_wins_over_the_default() -> None:
    defaults = parse_options({"report": True})
    body = {"messages": [USER], "refusal": {"report": False}}
    context = steered(CHAT, body, settings=Settings(defaults=defaults))
    assert context.report is False


ON: list[Any] = [True, 1, "true", "yes", "on", 1.0]
OFF: list[Any] = [False, 0, "false", None, "nonsense", [], 2]


@pytest.mark.parametrize(
    ("flag", "expected"), [*((flag, True) for flag in ON), *((flag, False) for flag in OFF)]
)
def test_flags_are_read_as_vllm_reads_them(flag: Any, expected: bool) -> None:
    beams = steered(COMPLETIONS, {"prompt": "x", "use_beam_search": flag})
    assert beams.beam_search is expected
    continued = steered(CHAT, {"messages": [ANSWERED], "continue_final_message": flag})
    assert continued.continues is expected


@pytest.mark.parametrize(
    ("path", "body", "prompts"),
    [
        (COMPLETIONS, {"prompt": ["x", "y", "z"]}, 3),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        ("/v1/chat/completions/batch", {"messages": [[USER], [USER]]}, 2),
        (CHAT, {"messages": [USER, USER]}, 1),
    ],
)
def test_engine_knows_how_many_prompts_share_its_bounds(
    path: str, body: dict[str, Any], prompts: int
) -> None:
    context = steered(path, body)
    assert context.prompts == prompts
    assert context.logprobs == 8192
    assert context.piece_logprobs == 1024


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_flags_that_vllm_would_drop_steer_nothing(path: str) -> None:
    # Else the decision would be looked for inside an earlier turn, or made once for several calls.
    body = {"messages": [ANSWERED], "continue_final_message": True, "use_beam_search": True}
    context = steered(path, body)
    chat = path in (CHAT, "/invocations")
    assert context.continues is (chat or path == "/v1/chat/completions/batch")
    assert context.beam_search is (chat or path == COMPLETIONS)


@pytest.mark.parametrize(
    ("messages", "continues"),
    [
        ([USER, ANSWERED], True),
        ([ANSWERED, USER], False),
        ([[USER, ANSWERED], [ANSWERED]], True),
        ([[USER], [USER]], False),
        ([[]], False),
        (["no message"], False),
    ],
)
def test_continued_turn_is_an_assistants(messages: list[Any], continues: bool) -> None:
    context = steered(CHAT, {"messages": messages, "continue_final_message": True})
    assert context.continues is continues


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "refusal": "No"}],
        [USER, {"role": "assistant", "content": "No", "refusal_category": "safety"}],
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}],
        [[USER, ANSWERED], [USER]],
    ],
)
def test_continuing_what_has_no_respond_token_is_refused(messages: list[Any]) -> None:
    server = FakeServer()
    answer = send_to(server, CHAT, {"messages": messages, "continue_final_message": True})
    assert_refused(answer, server, 400, "continue_final_message")


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [("x", False), (["x"], False), ([1, 2], False), (["x", "y"], True), ([[1], [2]], True)],
)
def test_beam_search_takes_one_prompt(prompt: Any, refused: bool) -> None:
    server = FakeServer()
    answer = send_to(server, COMPLETIONS, {"prompt": prompt, "use_beam_search": True})
    if refused:
        assert_refused(answer, server, 400, "prompt")
    else:
        assert answer.status_code == 200


def test_steering_is_reset_when_the_server_raises() -> None:
    server = FakeServer(error=RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        send_to(server, CHAT, {"messages": [USER]})
    assert server.context is not None

    async def around() -> None:
        app = steering_app(server)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            with pytest.raises(RuntimeError, match="boom"):
                await client.post(CHAT, json={"messages": [USER]})
        assert DECISION_CONTEXT.get() is None

    asyncio.run(around())


def count_of(route: str, status: str) -> float:
    labels = {"route": route, "status": status}
    return REGISTRY.get_sample_value("rheostat_requests_total", labels) or 0.0


def test_requests_are_counted_by_route_and_status_even_when_the_server_raises() -> None:
    before = [count_of(CHAT, status) for status in ("200", "422", "500")]
    send_to(FakeServer(), CHAT, {"messages": [USER]})
    send_to(FakeServer(), CHAT, {"refusal": 5})
    with pytest.raises(RuntimeError):
        send_to(FakeServer(error=RuntimeError()), CHAT, {"messages": [USER]})
    unreadable = FakeServer({(0, 0): Decision(0)}, (b"no JSON",))  # held back, then not sent
    with pytest.raises(ValueError, match="Expecting value"):
        send_to(unreadable, CHAT, {"messages": [USER]})
    after = [count_of(CHAT, status) for status in ("200", "422", "500")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 2]


# what generates nothing


@pytest.mark.parametrize("chunks", [0, 7])
def test_body_is_written_anew_as_it_was_parsed(chunks: int) -> None:
    raw = b'{ "messages" : [ {"role":"user","content":"caf\\u00e9"} ], "n":1.0, "n": 2 }'
    server = FakeServer()
    assert send_to(server, CHAT, raw, chunks=chunks).status_code == 200
    assert server.raw == '{"messages":[{"role":"user","content":"café"}],"n":2}'.encode()
    assert server.headers["content-length"] == str(len(server.raw))


@pytest.mark.parametrize(
    ("method", "path", "raw"),
    [
        ("POST", CHAT, b""),
        ("GET", "/v1/models", b""),
        ("GET", "/healthz", b""),
        ("POST", "/v1/messages/count_tokens", b'{"messages":[{"role":"assistant","content":"x"}]}'),
        ("POST", "/v1/responses/r/cancel", b"{}"),
    ],
)
def test_what_generates_nothing_is_not_steered(method: str, path: str, raw: bytes) -> None:
    server = FakeServer(parts=[b"as it ", b"is"])
    answer = send_to(server, path, raw, method=method)
    assert (server.raw, server.context, answer.content) == (raw, None, b"as it is")


# what is refused before vLLM sees it


def test_wrong_refusal_object_is_openais_error_body() -> None:
    server = FakeServer()
    body = {"messages": [USER], "refusal": {"categories": {"safety": 1.2}}}
    message = assert_refused(send_to(server, CHAT, body), server, 422, "refusal.categories.safety")
    assert message == ("refusal.categories.safety: a sensitivity lies between 0 and 1, got 1.2")


@pytest.mark.parametrize("refusal", [[], "x", 5, None])
def test_refusal_that_is_no_object_is_refused(refusal: Any) -> None:
    server = FakeServer()
    assert_refused(send_to(server, CHAT, {"refusal": refusal}), server, 422, "refusal")


def test_no_depth_of_nesting_crashes() -> None:
    # Around the parser's limit the body may be read and yet be too deep to guard or write again.
    statuses = []
    limit = sys.getrecursionlimit()
    settings = Settings(max_body_depth=2 * limit)
    for depth in (limit // 4, *range(limit - 120, limit + 5)):
        server = FakeServer()
        raw = b'{"refusal": {}, "x": ' + b"[" * depth + b"]" * depth + b"}"
        statuses.append(send_to(server, CHAT, raw, settings=settings).status_code)
        assert server.calls == (statuses[-1] == 200)
    assert set(statuses) == {200, 400}


# what the operator renders


def render(path: str, body: Any) -> tuple[httpx.Response, FakeServer]:
    server = FakeServer()
    settings = Settings(operator_key_hash=hash_key("operator"))
    headers = [("authorization", "Bearer operator")]
    answer = send_to(server, f"{path}/render", body, settings=settings, headers=headers)
    return answer, server


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_rendered_prompts_hold_the_control_tokens_of_earlier_turns(path: str) -> None:
    answer, server = render(path, {"messages": [USER, ANSWERED]})
    assert answer.status_code == 200
    assert server.body["messages"] == [USER, {**ANSWERED, "content": "[respond]Hi"}]
    assert server.context is None


def test_empty_turn_that_vllm_cannot_render_is_opened() -> None:
    empty = {"type": "message", "role": "assistant", "content": []}
    _, server = render(RESPONSES, {"input": [empty]})
    assert [part["text"] for part in server.body["input"][0]["content"]] == ["[respond]"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"input": [{**ANSWERED, "content": [{"type": "text"}]}]}, 400), (b"[" * 1000, 400)],
)
def test_turn_that_cannot_be_opened_is_not_rendered(body: object, status: int) -> None:
    answer, server = render(RESPONSES, body)
    assert (answer.status_code, server.calls) == (status, 0)


@pytest.mark.parametrize(
    ("root_path", "path"),
    [
        ("", CHAT),
        ("/api", f"/api{CHAT}"),
        ("/api", CHAT),
        ("/", CHAT),
        ("/v", CHAT),
    ],
)
def test_generating_routes_are_known_under_any_root_path(root_path: str, path: str) -> None:
    steered(path, {"messages": [USER], "refusal": {}}, root_path=root_path)


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_generating_route_takes_a_report(path: str) -> None:
    context = steered(path, {"refusal": {"report": True}})
    assert context.report is True


def test_disconnect_reaches_the_server_after_the_body() -> None:
    got: list[Message] = []
    coming: list[Message] = [
        {"type": "http.request", "body": b'{"messages"', "more_body": True},
        {"type": "http.request", "body": b": []}", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.extend([await receive(), await receive()])

    async def receive() -> Message:
        return coming.pop(0)

    async def nowhere(message: Message) -> None:
        raise AssertionError(message)

    middleware = steering_app(app)
    asyncio.run(middleware(scope_of(CHAT), receive, nowhere))
    assert got == [
        {"type": "http.request", "body": b'{"messages":[]}', "more_body": False},
        {"type": "http.disconnect"},
    ]
