import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.context import BODY, CALLER
from server.policies.book import Caller, PolicyBook
from server.policies.credentials import hash_key
from server.settings import Settings
from server.telemetry.trace import DecisionTrace
from server.web.access import ROUTES, Access
from server.web.middleware import RefusalMiddleware
from tests.server.boards import board, wide_admission
from tests.server.guards import GUARD
from tests.server.manifests import MANIFEST

CHAT = "/v1/chat/completions"
OPERATOR = {"authorization": "Bearer operator"}
SETTINGS = Settings(operator_key_hash=hash_key("operator"), max_body_bytes=2048)


class Inside:
    """Stands behind the gate and remembers what came through."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.raw = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        more = True
        while more:
            message = await receive()
            self.raw += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def callers(keys: Sequence[str]) -> PolicyBook:
    return PolicyBook.for_everybody(board(), keys)


def layer(
    inside: ASGIApp,
    settings: Settings = SETTINGS,
    keys: Sequence[str] = (),
    trace: DecisionTrace | None = None,
) -> RefusalMiddleware:
    known = callers(keys)
    return RefusalMiddleware(
        inside,
        manifest=MANIFEST,
        settings=settings,
        guard=GUARD,
        callers=known,
        admission=wide_admission(),
        trace=trace,
    )


def ask(
    method: str,
    path: str,
    inside: Any,
    *,
    headers: dict[str, str] | Sequence[tuple[str, str]] = (),
    content: bytes | None = None,
    chunks: int = 0,
    settings: Settings = SETTINGS,
    keys: Sequence[str] = (),
    trace: DecisionTrace | None = None,
) -> httpx.Response:
    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content or b""), chunks):
            yield (content or b"")[start : start + chunks]

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(layer(inside, settings, keys, trace))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = in_chunks() if chunks else content
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(send())


def assert_refused(answer: httpx.Response, status: int, said: str = "") -> None:
    assert answer.status_code == status
    if answer.request.url.path.startswith("/v1/messages"):
        assert answer.json()["type"] == "error"
        assert said in answer.json()["error"]["message"]
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kinds = {401: "authentication_error", 404: "not_found_error"}
    assert error["type"] == kinds.get(status, "invalid_request_error")
    assert said in error["message"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method}{route.path}")
def test_class_of_a_route_says_who_gets_in(route: Any) -> None:
    path = route.path.replace("{path:path}", "a").replace("{", "").replace("}", "")
    statuses = [
        ask(route.method, path, Inside(), headers=headers, keys=["tenant"]).status_code
        for headers in ({}, bearer("tenant"), OPERATOR)
    ]
    expected = {
        Access.OPEN: [200, 200, 200],
        Access.TENANT: [401, 200, 401],
        Access.OPERATOR: [401, 401, 200],
        Access.OFF: [404, 404, 404],
    }
    assert statuses == expected[route.access]


@pytest.mark.parametrize("access", [Access.OPERATOR, Access.OFF])
def test_operators_routes_are_off_without_its_key(access: Access) -> None:
    settings = Settings()
    for route in ROUTES:
        if route.access is access and "{" not in route.path:
            answer = ask(route.method, route.path, Inside(), headers=OPERATOR, settings=settings)
            said = "RHEOSTAT_OPERATOR_KEY_HASH" if access is Access.OPERATOR else "not served"
            assert_refused(answer, 404, said)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("b"), 200),
        ({"authorization": "bearer b"}, 200),
        ({"authorization": "Basic b"}, 401),
        ({"authorization": "b"}, 401),
        (bearer(""), 401),
        (bearer("c"), 401),
        (bearer("B"), 401),
        (bearer("b b"), 401),
        ({"x-api-key": "a"}, 200),
        ({"x-api-key": "c"}, 401),
        ({"cookie": "b"}, 401),
    ],
)
def test_any_of_the_servers_keys_opens_a_tenants_routes(
    headers: dict[str, str], status: int
) -> None:
    inside = Inside()
    answer = ask("POST", "/invocations", inside, headers=headers, keys=["a", "b"])
    assert answer.status_code == status
    assert len(inside.scopes) == (status == 200)
    if status == 401:
        assert_refused(answer, 401, "Authorization: Bearer KEY")
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_caller_and_body_are_handed_on() -> None:
    inside = Inside()
    raw = b'{"a": [1, 2], "a": 3}'
    assert ask("POST", CHAT, inside, content=raw, chunks=3).status_code == 200
    (scope,) = inside.scopes
    assert isinstance(scope[CALLER], Caller)
    assert scope[BODY] == {"a": 3}
    assert inside.raw == b'{"a":3}'  # what was parsed, so that vLLM's parser reads the same
    assert dict(scope["headers"])[b"content-length"] == b"7"


def test_what_only_the_operator_sends_is_bounded_and_not_read() -> None:
    inside = Inside()
    assert ask("POST", "/sleep", inside, headers=OPERATOR, content=b"{x").status_code == 200
    assert inside.scopes[0][BODY] is None
    assert inside.raw == b"{x"
    large = ask("POST", "/sleep", inside, headers=OPERATOR, content=b"x" * 2049)
    assert_refused(large, 413, "RHEOSTAT_MAX_BODY_BYTES")


@pytest.mark.parametrize("path", [CHAT, "/v1/messages/count_tokens", "/v1/responses/a/cancel"])
@pytest.mark.parametrize("chunks", [0, 100])
def test_body_is_bounded_whether_its_length_is_told_or_not(path: str, chunks: int) -> None:
    inside = Inside()
    fits = b'{"a": "' + b"x" * 2039 + b'"}'
    assert ask("POST", path, inside, content=fits, chunks=chunks).status_code == 200
    assert_refused(ask("POST", path, inside, content=fits + b" ", chunks=chunks), 413, "2048 bytes")
    assert len(inside.scopes) == 1


@pytest.mark.parametrize("content", [b"nope", b"[]", b'{"a": NaN}'])
def test_body_that_is_no_json_object_stays_outside(content: bytes) -> None:
    inside = Inside()
    assert_refused(ask("POST", CHAT, inside, content=content), 400)
    assert inside.scopes == []


def test_field_that_leads_around_the_decision_stays_outside() -> None:
    inside = Inside()
    answer = ask("POST", CHAT, inside, content=b'{"kv_transfer_params": {"prompt_token_ids": [1]}}')
    assert_refused(answer, 400, "kv_transfer_params")
    assert answer.json()["error"]["param"] == "kv_transfer_params"
    assert inside.scopes == []


def test_load_of_all_is_not_told_to_one() -> None:
    headers = {"Endpoint-Load-Metrics-Format": "json"}
    assert_refused(ask("POST", CHAT, Inside(), headers=headers, content=b"{}"), 400, "/metrics")
    assert ask("GET", "/healthz", Inside(), headers=headers).status_code == 200


def test_compressed_body_is_refused() -> None:
    for encoding in ("gzip", "identity, gzip", "br"):
        headers = {"content-encoding": encoding}
        answer = ask("POST", CHAT, Inside(), headers=headers, content=b"{}")
        assert_refused(answer, 415, "Content-Encoding")
    headers = {"content-encoding": "Identity"}
    assert ask("POST", CHAT, Inside(), headers=headers, content=b"{}").status_code == 200


def test_head_is_bounded_before_anybody_is_known() -> None:
    assert_refused(ask("GET", "/v1/models", Inside(), headers={"a": "b" * 40_000}), 413)
    many = [(f"a{i}", "b") for i in range(100)]
    assert_refused(ask("GET", "/healthz", Inside(), headers=many), 413, "RHEOSTAT_MAX_HEADERS")
    assert_refused(ask("GET", "/healthz?" + "a" * 9000, Inside()), 414)


def test_other_methods_are_answered_with_those_that_exist() -> None:
    answer = ask("PUT", CHAT, Inside())
    assert_refused(answer, 405, "takes POST, not PUT")
    assert answer.headers["allow"] == "POST"


def preflight(method: str) -> dict[str, str]:
    return {"origin": "http://page", "access-control-request-method": method}


def test_page_of_another_origin_may_read_errors_of_ours() -> None:
    inside = Inside()
    cors = CORSMiddleware(layer(inside, keys=["tenant"]), allow_origins=["*"], allow_methods=["*"])

    async def send(method: str, headers: dict[str, str]) -> httpx.Response:
        transport = httpx.ASGITransport(cors)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, CHAT, headers=headers)

    assert asyncio.run(send("OPTIONS", preflight("POST"))).status_code == 200
    refused = asyncio.run(send("POST", {"origin": "http://page"}))
    assert_refused(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "*"
    assert_refused(ask("OPTIONS", CHAT, inside, headers=preflight("POST")), 405)
    assert inside.scopes == []


def test_lifespan_passes() -> None:
    inside = Inside()

    async def nothing() -> Message:
        return {}

    async def nowhere(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(layer(inside)({"type": "lifespan"}, nothing, nowhere))
    assert [scope["type"] for scope in inside.scopes] == ["lifespan"]


def test_what_stays_outside_is_counted() -> None:
    def count(route: str, status: str) -> float:
        labels = {"model_name": "", "route": route, "status": status}
        return REGISTRY.get_sample_value("rheostat_requests_total", labels) or 0

    before = count(CHAT, "401"), count("none", "404")
    ask("POST", CHAT, Inside(), keys=["tenant"])
    ask("POST", "/nothing", Inside())
    assert (count(CHAT, "401"), count("none", "404")) == (before[0] + 1, before[1] + 1)


def test_what_is_denied_is_told_to_the_trace(tmp_path: Path) -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        status = {b"403": 403, b"499": 499, b"500": 500}.get(scope["query_string"], 200)
        await send({"type": "http.response.start", "status": status, "headers": []})
        error = {"message": "m", "param": "refusal.my words", "code": "not_allowed"}
        await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

    trace = DecisionTrace(tmp_path / "trace.jsonl", [])
    options: dict[str, Any] = {"keys": ["tenant"], "trace": trace}
    with_key = {**bearer("tenant"), "x-request-id": "id-1"}
    ask("GET", "/v1/my-own-words", answers, **options)
    ask("HEAD", "/metrics", answers, **options)
    ask("POST", CHAT, answers, content=b"{", headers=with_key, **options)
    for query in ("", "?403", "?403", "?499", "?500"):
        ask("GET", f"/v1/models{query}", answers, headers=with_key, **options)
    told = [(one.request_id, *one.denial[1:], one.times) for one in trace.denials.take()]
    assert told == [
        (None, "none", 404, "not_found", None, 1),
        (None, "/metrics", 401, "invalid_api_key", None, 1),
        ("id-1", CHAT, 400, "invalid_request", None, 1),
        ("id-1", "/v1/models", 403, "not_allowed", "refusal", 2),
    ]


def test_client_that_leaves_within_its_body_was_denied_nothing(tmp_path: Path) -> None:
    trace = DecisionTrace(tmp_path / "trace.jsonl", [])
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "query_string": b"",
        "headers": [(b"content-length", b"9")],
    }

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def take(message: Message) -> None:
        pass

    asyncio.run(layer(Inside(), trace=trace)(scope, leave, take))
    assert trace.denials.take() == []
