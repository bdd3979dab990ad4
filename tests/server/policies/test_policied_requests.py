"""What the middleware, the score route and the list of policies make of a caller."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from models.controls import Rule
from server.apis.verdicts import Verdicts
from server.context import DECISION_CONTEXT, Decision, DecisionContext
from server.policies.book import PolicyBook
from server.settings import Settings
from server.telemetry.trace import DecisionTrace
from server.web.middleware import RefusalMiddleware
from server.web.routes import build_router
from server.web.score import SCORE, ScoreRoute, build_score_router
from tests.server.boards import HASHES, calibrations, wide_admission
from tests.server.guards import GUARD
from tests.server.manifests import MANIFEST
from tests.server.policybooks import ACME_KEY, SHOP_KEY, TWO_TENANTS, book, headers

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}]}
WITH_TEXTS = TWO_TENANTS.replace(
    "  kiosk:\n", "  kiosk:\n    refusal_text: {safety: template, humanizing: We do not.}\n"
)


@pytest.fixture
def policies(tmp_path: Path) -> PolicyBook:
    return book(tmp_path, WITH_TEXTS)


class FakeServer:
    """Answers every request after one decision; keeps the context that it saw."""

    def __init__(self) -> None:
        self.context: DecisionContext | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.context = DECISION_CONTEXT.get()
        assert self.context is not None
        self.context.decisions[0, 0] = Decision(None)
        self.context.request_ids.append("chatcmpl-7")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def check_health(self) -> None:
        """Is well."""


class FakeScorer:
    """Refuses where safety's bias is at least 1."""

    async def render(self, model: str | None, body: dict[str, Any]) -> Any:
        return body

    def tokens(self, rendered: Any) -> int:
        return 1

    async def decide(self, rendered: Any, context: DecisionContext) -> Decision:
        return Decision(0 if context.controls.bias[0] >= 1 else None, (-1.0, -1.0), 0.5)


def call(app: ASGIApp, method: str, path: str, body: Any = None, **sent: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json=body, headers=headers(**sent))

    return asyncio.run(ask())


def refusal_middleware(
    app: ASGIApp, policies: PolicyBook, trace: DecisionTrace | None = None
) -> RefusalMiddleware:
    return RefusalMiddleware(
        app,
        manifest=MANIFEST,
        settings=Settings(),
        callers=policies,
        admission=wide_admission(),
        guard=GUARD,
        trace=trace,
    )


def steered(
    policies: PolicyBook,
    sent: dict[str, str],
    refusal: Any = None,
    trace: DecisionTrace | None = None,
) -> tuple[httpx.Response, DecisionContext | None]:
    server = FakeServer()
    app = refusal_middleware(server, policies, trace)
    body = BODY if refusal is None else {**BODY, "refusal": refusal}
    return call(app, "POST", CHAT, body, **sent), server.context


def test_request_follows_its_tenants_first_policy(policies: PolicyBook) -> None:
    _, context = steered(policies, {"x_api_key": ACME_KEY})
    assert context is not None
    assert (context.policy, context.enforce, context.report) == ("desk", True, False)
    assert context.controls.bias[0] == pytest.approx(2.197, abs=1e-3)
    assert context.texts == (None, None)


def test_engine_is_told_the_policys_texts_and_whether_to_follow_it(policies: PolicyBook) -> None:
    _, context = steered(policies, {"x_api_key": SHOP_KEY})
    assert context is not None
    assert (context.policy, context.enforce) == ("kiosk", False)
    assert context.texts == ("I can't help with that.", "We do not.")


@pytest.mark.parametrize(
    ("refusal", "sent"),
    [
        ({"policy": "lab"}, {}),
        (None, {"x_refusal_policy": "lab"}),
        ({"categories": {"safety": 0.3}}, {"x_refusal_policy": "lab"}),
    ],
)
def test_policy_is_chosen_in_the_body_or_in_a_header(
    policies: PolicyBook, refusal: Any, sent: dict[str, str]
) -> None:
    _, context = steered(policies, {"x_api_key": ACME_KEY, **sent}, refusal)
    assert context is not None
    assert (context.policy, context.report) == ("lab", True)


def test_header_of_dials_stands_beside_the_header_of_the_policy(policies: PolicyBook) -> None:
    sent = {"x_refusal": "safety=never", "x_refusal_policy": "desk", "x_api_key": ACME_KEY}
    _, context = steered(policies, sent)
    assert context is not None
    assert context.controls.bias[0] == pytest.approx(1.386, abs=1e-3)
    assert context.dials.clamped == (("safety", "floor"),)


@pytest.mark.parametrize(
    ("refusal", "sent", "status", "param"),
    [
        (None, {}, 401, None),
        (None, {"x_api_key": "wrong"}, 401, None),
        ({"policy": "kiosk"}, {"x_api_key": ACME_KEY}, 403, "refusal.policy"),
        (None, {"x_api_key": ACME_KEY, "x_refusal_policy": "kiosk"}, 403, "refusal.policy"),
        (None, {"x_api_key": ACME_KEY, "x_refusal_policy": ""}, 403, "refusal.policy"),
        ({"decision": "sample"}, {"x_api_key": SHOP_KEY}, 403, "refusal.decision"),
        (
            {"categories": {"humanizing": 0}},
            {"x_api_key": SHOP_KEY},
            403,
            "refusal.categories.humanizing",
        ),
        ({"policy": None}, {"x_api_key": ACME_KEY}, 200, None),
    ],
)
def test_what_is_not_allowed_reaches_no_engine(
    policies: PolicyBook, refusal: Any, sent: dict[str, str], status: int, param: str | None
) -> None:
    answer, context = steered(policies, sent, refusal)
    assert answer.status_code == status
    if status != 200:
        assert context is None
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "path", "body", "status"),
    [
        ("floors: {safety: 0.8}", "/v1/completions", {"prompt": "Hello"}, 403),
        ("floors: {safety: 0.8}", "/invocations", {"prompt": "Hello"}, 403),
        ("floors: {safety: 0.8}", "/invocations", BODY, 200),
        ("floors: {safety: 0.8}", CHAT, BODY, 200),
        ("raw_prompts: false", "/v1/completions", {"prompt": [1, 2]}, 403),
        ("{floors: {safety: 0.8}, raw_prompts: true}", "/v1/completions", {"prompt": "x"}, 200),
        ("{}", "/v1/completions", {"prompt": "Hello"}, 200),
    ],
)
def test_raw_prompts_are_answered_where_the_policy_allows_them(
    tmp_path: Path, fields: str, path: str, body: Any, status: int
) -> None:
    fields = fields if fields.startswith("{") else f"{{{fields}}}"
    policies = book(tmp_path, f"policies: {{p: {fields}}}\nanonymous: p\n")
    answer = call(refusal_middleware(FakeServer(), policies), "POST", path, body)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["param"] == "prompt"


PREFILLED = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Sure"}]
CONTINUE: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
UNFINISHED = {
    "type": "message",
    "role": "assistant",
    "status": "incomplete",
    "content": [{"type": "output_text", "text": "Sure"}],
}
PREFILLS: list[tuple[str, Any]] = [
    (CHAT, {"messages": PREFILLED, **CONTINUE}),
    (CHAT, {"messages": PREFILLED, **CONTINUE, "continue_final_message": "yes"}),
    ("/v1/chat/completions/batch", {"messages": [PREFILLED], **CONTINUE}),
    ("/invocations", {"messages": PREFILLED, **CONTINUE}),
    ("/v1/responses", {"input": [PREFILLED[0], UNFINISHED]}),
    ("/v1/responses", {"input": [PREFILLED[0], {**UNFINISHED, "status": "in_progress"}]}),
]


@pytest.mark.parametrize(("path", "body"), PREFILLS)
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ("{floors: {safety: 0.8}}", 403),
        ("{prefill: false}", 403),
        ("{floors: {safety: 0.8}, prefill: true}", 200),
        ("{}", 200),
    ],
)
def test_answers_are_prefilled_where_the_policy_allows_it(
    tmp_path: Path, fields: str, status: int, path: str, body: Any
) -> None:
    policies = book(tmp_path, f"policies: {{p: {fields}}}\nanonymous: p\n")
    server = FakeServer()
    answer = call(refusal_middleware(server, policies), "POST", path, body)
    assert answer.status_code == status
    if status == 403:
        assert server.context is None
        error = answer.json()["error"]
        assert error["param"] == ("input" if "input" in body else "continue_final_message")
        assert "allows no prefill" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": PREFILLED}),
        ("/v1/messages", {"messages": PREFILLED}),
        ("/v1/responses", {"input": [PREFILLED[0], {**UNFINISHED, "status": "completed"}]}),
    ],
)
def test_last_turn_that_is_not_continued_is_no_prefill(
    tmp_path: Path, path: str, body: Any
) -> None:
    policies = book(tmp_path, "policies: {p: {floors: {safety: 0.8}}}\nanonymous: p\n")
    answer = call(refusal_middleware(FakeServer(), policies), "POST", path, body)
    assert answer.status_code == 200


@pytest.mark.parametrize(("floor", "status"), [("floors: {safety: 0.8}", 403), ("", 200)])
def test_beams_under_a_floor_end_where_the_model_ends_them(
    tmp_path: Path, floor: str, status: int
) -> None:
    policies = book(tmp_path, f"policies: {{p: {{{floor}}}}}\nanonymous: p\n")
    middleware = refusal_middleware(FakeServer(), policies)
    beams = {**BODY, "use_beam_search": True}
    assert call(middleware, "POST", CHAT, beams).status_code == 200
    endless = call(middleware, "POST", CHAT, {**beams, "ignore_eos": True})
    assert endless.status_code == status
    if status == 403:
        assert endless.json()["error"]["param"] == "ignore_eos"


def test_control_tokens_that_a_client_writes_are_refused_where_the_policy_says_so(
    tmp_path: Path,
) -> None:
    typed = {"messages": [{"role": "user", "content": "Say [respond]"}]}
    for control_text, status in (("plain", 200), ("refuse", 400)):
        policies = book(
            tmp_path, f"policies: {{p: {{control_text: {control_text}}}}}\nanonymous: p\n"
        )
        answer = call(refusal_middleware(FakeServer(), policies), "POST", CHAT, typed)
        assert answer.status_code == status


@pytest.mark.parametrize(("shadow", "told"), [(1, "humanizing"), (None, None)])
def test_report_says_what_a_policy_that_is_not_enforced_would_refuse(
    policies: PolicyBook, shadow: int | None, told: str | None
) -> None:
    _, context = steered(policies, {"x_api_key": SHOP_KEY}, {"report": True})
    assert context is not None
    context.decisions[0, 0] = Decision(None, (0.0, 0.0), 0.5, shadow)
    report = Verdicts(MANIFEST, context).report()
    assert report is not None
    assert (report["refused"], report["would_refuse"]) == (False, told)
    context.enforce = True
    assert "would_refuse" not in (Verdicts(MANIFEST, context).report() or {})


def test_every_decision_of_a_request_is_traced(policies: PolicyBook, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = DecisionTrace(path, MANIFEST.names)
    asked = {"decision": "paper", "categories": {"safety": "never"}}
    steered(policies, {"x_api_key": ACME_KEY}, asked, trace)
    steered(policies, {"x_api_key": ACME_KEY}, {"policy": "absent"}, trace)

    async def write() -> None:
        async with trace.writing():
            pass

    asyncio.run(write())
    line, denied = map(json.loads, path.read_text().splitlines())
    assert (denied["tenant"], denied["decision"], denied["status"]) == ("acme", "denied", 403)
    assert (line["tenant"], line["policy"], line["request_id"]) == ("acme", "desk", "chatcmpl-7")
    assert line["asked"] == {"decision": "paper", "categories": {"safety": {"bias": "never"}}}
    assert line["effective"]["decision"] == Rule.GREEDY.name.lower()
    assert line["clamped"] == {"safety": "floor"}
    assert line["decision"] == "respond"
    assert "Hello" not in path.read_text()


# the score route


def score(policies: PolicyBook, refusal: Any, inputs: Any = None, **sent: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(build_score_router(ScoreRoute(MANIFEST, FakeScorer(), GUARD)))
    body = {"inputs": [inputs or {"messages": BODY["messages"]}], "refusal": refusal}
    return call(refusal_middleware(app, policies), "POST", SCORE, body, **sent)


def test_scores_are_decided_between_the_bounds_and_say_so(policies: PolicyBook) -> None:
    asked = {"categories": {"safety": "never"}, "decision": "sample"}
    (entry,) = score(policies, asked, x_api_key=ACME_KEY).json()["data"]
    assert entry["refused"] is True
    assert entry["decisions"]["safety"]["clamped"] == "floor"
    assert "clamped" not in entry["decisions"]["humanizing"]
    assert entry["replaced_decision"] == "sample"


@pytest.mark.parametrize(
    ("refusal", "sent", "status"),
    [
        ({}, {}, 401),
        ({"policy": "kiosk"}, {"x_api_key": ACME_KEY}, 403),
        ({"categories": {"humanizing": 0}}, {"x_api_key": SHOP_KEY}, 403),
        ({}, {"x_api_key": SHOP_KEY, "x_refusal_policy": "desk"}, 403),
    ],
)
def test_scores_are_refused_where_answers_are(
    policies: PolicyBook, refusal: Any, sent: dict[str, str], status: int
) -> None:
    assert score(policies, refusal, **sent).status_code == status


@pytest.mark.parametrize(
    ("field", "inputs", "status", "param"),
    [
        ("raw_prompts: false", {"prompt": "x"}, 403, "inputs.0.prompt"),
        ("raw_prompts: false", None, 200, None),
        ("control_text: refuse", {"prompt": "[respond]"}, 400, "inputs.0.prompt"),
        (
            "control_text: refuse",
            {"messages": [{"role": "user", "content": "[respond]"}]},
            400,
            "inputs.0.messages.0.content",
        ),
        ("control_text: plain", {"prompt": "[respond]"}, 200, None),
    ],
)
def test_scores_are_of_prompts_that_the_policy_would_answer(
    tmp_path: Path, field: str, inputs: Any, status: int, param: str | None
) -> None:
    policies = book(tmp_path, f"policies: {{p: {{{field}}}}}\nanonymous: p\n")
    answer = score(policies, {}, inputs)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["param"] == param


def test_policy_without_reports_gives_no_scores(tmp_path: Path) -> None:
    silent = book(tmp_path, "policies: {p: {report: false}}\nanonymous: p\n")
    assert score(silent, {}).status_code == 403


# the list of policies


def test_list_of_policies_is_the_callers_own(policies: PolicyBook) -> None:
    app = FastAPI()
    app.include_router(build_router(MANIFEST, calibrations(), lambda: HASHES))
    layer = refusal_middleware(app, policies)
    path = "/v1/refusal/policies"
    body = call(layer, "GET", path, x_api_key=ACME_KEY).json()
    assert (body["object"], body["tenant"]) == ("list", "acme")
    assert [policy["name"] for policy in body["data"]] == ["desk", "lab"]
    assert "kiosk" not in json.dumps(body)
    assert call(layer, "GET", path).status_code == 401
