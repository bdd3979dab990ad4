"""What vLLM gets of a request."""

import asyncio
import json
import math
import sys
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from models.controls import Controls, Rule
from models.manifest import Manifest
from server.apis.turns import MESSAGES, READS_CHAT, RESPONSES
from server.context import DECISION_CONTEXT, Decision, DecisionContext
from server.dials.protocol import parse_options
from server.policies.credentials import hash_key
from server.settings import Settings
from server.web.middleware import GENERATING, RAW_PROMPTS
from tests.server.guards import MARK
from tests.server.manifests import MANIFEST
from tests.server.middlewares import (
    ANSWERED,
    CHAT,
    COMPLETIONS,
    USER,
    FakeServer,
    assert_refused,
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


def test_report_explains_the_dials_where_a_calibration_is_loaded() -> None:
    body: Any = {"messages": [USER], "refusal": {"categories": {"safety": 0.9}}}
    assert steered(CHAT, body, calibrations=["default"]).dials.forecast is None
    body["refusal"]["report"] = True
    explained = steered(CHAT, body, calibrations=["default"])
    assert explained.dials.forecast is not None
    assert explained.dials.forecast.calibration == "default"


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


def test_invocations_take_messages_or_a_prompt() -> None:
    server = FakeServer()
    answer = send_to(server, "/invocations", {"prompt": "[respond]", "messages": [ANSWERED]})
    assert_refused(answer, server, 400, "prompt")
    for body in ({"prompt": "x"}, {"messages": [USER]}):
        assert send_to(FakeServer(), "/invocations", body).status_code == 200


@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_generating_route_is_steered(path: str) -> None:
    server = FakeServer()
    refusal = {"report": True, "categories": {"safety": "always"}}
    send_to(server, path, {"input": "x", "refusal": refusal})
    assert server.context is not None
    assert server.context.controls.bias == (float("inf"), 0.0)
    assert server.context.report is True
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


class Counting(FakeServer):
    """Notes how many requests are in flight while it has one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_flight = in_flight()
        await super().__call__(scope, receive, send)


def in_flight() -> float | None:
    return REGISTRY.get_sample_value("rheostat_requests_in_flight", {"model_name": ""})


def test_request_is_in_flight_until_it_ends_however_it_ends() -> None:
    server = Counting()
    send_to(server, CHAT, {"messages": [USER]})
    assert (server.in_flight, in_flight()) == (1, 0)
    failing = Counting(error=ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        send_to(failing, CHAT, {"messages": [USER]})
    assert (failing.in_flight, in_flight()) == (1, 0)
    listing = Counting()
    send_to(listing, "/v1/models", b"", method="GET")
    assert (listing.in_flight, in_flight()) == (0, 0)


def count_of(route: str, status: str) -> float:
    labels = {"model_name": "", "route": route, "status": status}
    return REGISTRY.get_sample_value("rheostat_requests_total", labels) or 0.0


def test_requests_are_counted_by_route_and_status_even_when_the_server_raises() -> None:
    before = [count_of(CHAT, status) for status in ("200", "422", "500")]
    send_to(FakeServer(), CHAT, {"messages": [USER]})
    send_to(FakeServer(), CHAT, {"refusal": 5})
    with pytest.raises(RuntimeError):
        send_to(FakeServer(error=RuntimeError()), CHAT, {"messages": [USER]})
    unreadable = FakeServer({(0, 0): Decision(0)}, (b"no JSON",))  # held back, then not sent
    with pytest.raises(ValueError, match="malformed"):
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


def render(
    path: str, body: Any, manifest: Manifest = MANIFEST, rendered: bytes = b"{}"
) -> tuple[httpx.Response, FakeServer]:
    server = FakeServer(parts=(rendered,))
    settings = Settings(operator_key_hash=hash_key("operator"))
    headers = [("authorization", "Bearer operator")]
    answer = send_to(
        server, f"{path}/render", body, settings=settings, headers=headers, manifest=manifest
    )
    return answer, server


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_rendered_prompts_hold_the_control_tokens_of_earlier_turns(path: str) -> None:
    answer, server = render(path, {"messages": [USER, ANSWERED]})
    assert answer.status_code == 200
    assert server.body["messages"] == [USER, {**ANSWERED, "content": "[respond]Hi"}]
    assert server.context is None


@pytest.mark.parametrize("offsets", [None, [[0, 1], [1, 2], [2, 3], [3, 4]]])
def test_rendered_prompt_is_what_a_model_reads_that_keeps_no_control_tokens(offsets: Any) -> None:
    first, *_ = MANIFEST.control_ids
    respond = MANIFEST.respond.id
    told = {"token_ids": [1, respond, 2, first], "token_offsets": offsets, "model": "demo"}
    manifest = MANIFEST.model_copy(update={"kept": False})
    answer, server = render(CHAT, {"messages": [USER]}, manifest, json.dumps(told).encode())
    bare = None if offsets is None else [[0, 1], [2, 3]]
    assert answer.json() == {"token_ids": [1, 2], "token_offsets": bare, "model": "demo"}
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
