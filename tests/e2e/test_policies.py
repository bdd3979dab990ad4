"""One server with a policy file: who may call, what no dial gets around, and reading it again."""

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from models.calibration import calibration_path, load_calibration
from server.policies.credentials import hash_key
from tests.e2e.attacks import TARGETS, TOOL
from tests.e2e.attacks import Target as Route
from tests.e2e.policied import ACME, FILE, FIXED_TEXT, SECRET, SHOP, Policied
from tests.e2e.servers import Post, until

ACMES = {"authorization": f"Bearer {ACME}"}
CHAT = "/v1/chat/completions"
SCORE = "/v1/refusal/score"
POLICIES = "/v1/refusal/policies"
QUESTION = {"role": "user", "content": "What is the capital of France, please?"}
CHAT_BODY = {"model": "demo", "messages": [QUESTION], "max_tokens": 4}
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: CHAT_BODY,
    "/v1/completions": {"model": "demo", "prompt": "Hello there", "max_tokens": 4},
    "/v1/responses": {"model": "demo", "input": "Hello there", "max_output_tokens": 4},
    "/v1/messages": CHAT_BODY,
    "/invocations": CHAT_BODY,
}
BAD_RELOADS = 'rheostat_policy_reloads_total{model_name="demo",result="bad"}'
SPENT = "vllm:generation_tokens_total{"
NO_FLOOR = FILE.replace("    floors: {safety: {bias: 60}}\n    raw", "    raw")
ALL_NEVER = dict.fromkeys(
    ("safety", "humanizing", "incomplete", "indeterminate", "unsupported"), "never"
)


@pytest.fixture
def acme(policied: Policied) -> Iterator[httpx.Client]:
    with policied.client(ACME) as client:
        yield client


@pytest.fixture
def shop(policied: Policied) -> Iterator[httpx.Client]:
    with policied.client(SHOP) as client:
        yield client


def decision(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-refusal-decision"]


# who may call


TENANTS_ROUTES = [
    *(("POST", path) for path in (*ROUTES, SCORE)),
    *(("GET", path) for path in (POLICIES, "/v1/models", "/v1/refusal/calibration")),
]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer unused"},
        {"authorization": f"Bearer {hash_key(ACME)}"},
        {"x-tenant": "shop"},
        {"x-tenant": "shop", "x-gateway-secret": "guessed"},
        {"x-tenant": "acme", "x-gateway-secret": SECRET},
    ],
    # The keys are others in each process.
    ids=["no key", "unknown key", "hash", "tenant", "guessed secret", "tenant without header"],
)
def test_nobody_but_the_tenants_may_call(policied: Policied, headers: dict[str, str]) -> None:
    for method, path in TENANTS_ROUTES:
        answer = policied.server.http.request(method, path, json=CHAT_BODY, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        if path == "/v1/messages":  # Anthropic's shape, which has no code
            assert error["type"] == "authentication_error"
        else:
            assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SHOP}"},
        {"x-api-key": SHOP},
        {"x-tenant": "shop", "x-gateway-secret": SECRET},
    ],
    ids=["bearer", "x-api-key", "gateway"],
)
def test_tenant_sees_its_own_policies_and_nothing_of_others(
    policied: Policied, headers: dict[str, str]
) -> None:
    answer = policied.server.http.get(POLICIES, headers=headers)
    assert answer.status_code == 200
    body = answer.json()
    assert body["tenant"] == "shop"
    (strict,) = body["data"]
    assert (strict["name"], strict["outside"]) == ("strict", "refuse")
    assert strict["categories"]["safety"]["floor"]["bias"] == 60
    assert strict["categories"]["humanizing"]["ceiling"] == {"bias": 0.0, "sensitivity": 0.5}
    assert not {"acme", "desk", "lab"} & set(answer.text.replace('"', " ").split())


# no dial gets around a floor

DIALS: list[dict[str, Any]] = [
    {},
    {"categories": ALL_NEVER},
    {"categories": {"safety": 0}},
    {"categories": {"safety": 0.5}},
    {"categories": {"safety": {"bias": -1e308}}},
    {"categories": {"safety": {"rate": 0}}},
    {"categories": {**ALL_NEVER, "safety": {"rate": 0.1}}, "calibration": "tenant"},
    {"categories": {"safety": {"false_refusal_rate": 0}}},
    {"categories": ALL_NEVER, "decision": "sample"},
    {"categories": ALL_NEVER, "decision": "paper"},
    {"decision": "paper"},
    {"categories": {"safety": {"rate": 0.1}}, "decision": "sample"},
    {"policy": "desk", "categories": ALL_NEVER, "report": True},
]
BEYOND = [dials for dials in DIALS if dials and "policy" not in dials]


def test_no_dial_of_a_request_gets_below_the_floor(policied: Policied) -> None:
    cases = [(path, dials) for path in ROUTES for dials in DIALS]
    posts = [Post(path, {**ROUTES[path], "refusal": dials}) for path, dials in cases]
    answers = policied.server.post_all(posts, **ACMES)
    verdicts = {str(case): decision(answer) for case, answer in zip(cases, answers, strict=True)}
    assert {case: said for case, said in verdicts.items() if said != "refuse"} == {}


def test_refusal_in_content_is_refused_all_the_same(acme: httpx.Client) -> None:
    refusal = {"categories": ALL_NEVER, "refusal_in": ["refusal", "content"]}
    answer = acme.post(CHAT, json={**CHAT_BODY, "refusal": refusal})
    assert decision(answer) == "refuse"
    message = answer.json()["choices"][0]["message"]
    assert message["content"] == message["refusal"] != ""


def test_no_temperature_and_no_draw_gets_below_the_floor(policied: Policied) -> None:
    asked = {"decision": "sample", "categories": ALL_NEVER}
    draws = [(temperature, seed) for temperature in (0, 1, 2.0) for seed in range(3)]
    posts = [
        Post(
            CHAT,
            {**CHAT_BODY, "temperature": t, "seed": seed, "n": 2 if t else 1} | {"refusal": asked},
        )
        for t, seed in draws
    ]
    for draw, answer in zip(draws, policied.server.post_all(posts, **ACMES), strict=True):
        assert set(decision(answer).split(", ")) == {"refuse"}, draw


@pytest.mark.parametrize(
    "dials", ["safety=never", "safety=bias:-99", "safety=rate:0, humanizing=never", "safety=0"]
)
def test_header_form_does_not_get_below_the_floor(acme: httpx.Client, dials: str) -> None:
    for more in ({}, {"x-refusal-policy": "desk"}):
        answer = acme.post(CHAT, json=CHAT_BODY, headers={"x-refusal": dials, **more})
        assert decision(answer) == "refuse"


def test_score_shows_the_floor_and_what_was_clamped(acme: httpx.Client) -> None:
    asked = {"categories": {"safety": "never"}, "decision": "paper"}
    body = {"inputs": [{"messages": [QUESTION]}], "refusal": asked}
    answer = acme.post(SCORE, json=body)
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    assert entry["refused"] is True
    assert entry["decisions"]["safety"]["bias"] == 60
    assert entry["decisions"]["safety"]["clamped"] == "floor"
    assert "clamped" not in entry["decisions"]["humanizing"]
    assert entry["replaced_decision"] == "paper"


def test_policy_that_does_not_clamp_answers_403(policied: Policied, shop: httpx.Client) -> None:
    scored = {"inputs": [{"messages": [QUESTION]}]}
    bodies: dict[str, dict[str, Any]] = {CHAT: CHAT_BODY, "/v1/messages": CHAT_BODY, SCORE: scored}
    cases = [(path, dials) for path in bodies for dials in BEYOND]
    posts = [Post(path, {**bodies[path], "refusal": dials}) for path, dials in cases]
    answers = policied.server.post_all(posts, authorization=f"Bearer {SHOP}")
    for (path, dials), answer in zip(cases, answers, strict=True):
        assert answer.status_code == 403, (path, dials)
        error = answer.json()["error"]
        if path == "/v1/messages":  # Anthropic's shape, which has no code
            assert error["type"] == "permission_error"
        else:
            assert error["code"] == "not_allowed"
    assert decision(shop.post(CHAT, json=CHAT_BODY)) == "refuse"


# fixed texts, shadow mode, a floor that is a rate


@pytest.mark.parametrize(
    "fields", [{}, {"seed": 3, "temperature": 1}, {"min_tokens": 3}], ids=json.dumps
)
def test_fixed_text_ends_the_request_at_the_decision(
    policied: Policied, fields: dict[str, Any]
) -> None:
    kiosk = {"refusal": {"policy": "kiosk"}}
    posts = [Post(route.path, {**route.body(), **fields, **kiosk}) for route in TARGETS]
    before = policied.server.metric(SPENT)
    answers = policied.server.post_all(posts, **ACMES)
    expected = {route.name: 2 if route.name == "batch" else 1 for route in TARGETS}
    assert policied.server.metric(SPENT) - before == sum(expected.values())
    for route, answer in zip(TARGETS, answers, strict=True):
        assert answer.status_code == 200, (route.name, answer.text)
        assert FIXED_TEXT in answer.text, route.name
        if not route.body().get("stream"):
            assert set(decision(answer).split(", ")) == {"refuse"}
            assert answer.text.count(FIXED_TEXT) == expected[route.name]
            usage = answer.json()["usage"]
            assert usage.get("completion_tokens", usage.get("output_tokens")) == 0


def test_fixed_text_takes_the_place_of_a_tool_call_and_of_json(acme: httpx.Client) -> None:
    schema = {"name": "a", "schema": {"type": "object"}}
    for fields in (
        {"tools": [TOOL], "tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
    ):
        body = {**CHAT_BODY, **fields, "refusal": {"policy": "kiosk"}}
        (choice,) = acme.post(CHAT, json=body).json()["choices"]
        assert choice["message"]["refusal"] == FIXED_TEXT
        assert choice["message"]["content"] is None
        assert not choice["message"].get("tool_calls")
        assert choice["finish_reason"] == "stop"


def test_shadow_policy_answers_and_says_what_it_would_have_refused(policied: Policied) -> None:
    shadow = {"temperature": 0, "refusal": {"policy": "trial", "report": True}}
    free = {"temperature": 0, "refusal": {"policy": "lab", "categories": ALL_NEVER}}

    def ask(routes: list[Route], fields: dict[str, Any]) -> list[tuple[Route, httpx.Response]]:
        posts = [Post(route.path, {**route.body(), **fields}) for route in routes]
        return list(zip(routes, policied.server.post_all(posts, **ACMES), strict=True))

    shadowed = {route.name: answer for route, answer in ask(TARGETS, shadow)}
    for route in TARGETS:
        answer = shadowed[route.name]
        assert answer.status_code == 200, (route.name, answer.text)
        assert '"would_refuse":"safety"' in answer.text, route.name
        if not route.body().get("stream"):
            assert set(decision(answer).split(", ")) == {"respond"}
    # lab takes no raw prompts
    for route, answer in ask([r for r in TARGETS if "text" not in r.name.split()], free):
        assert texts(answer) == texts(shadowed[route.name]) != "", route.name


def texts(answer: httpx.Response) -> str:
    """Returns all the text that an answer or its events hold."""
    kept = re.findall(r'"(?:content|text|delta)":"((?:[^"\\\\]|\\\\.)+)"', answer.text)
    return "".join(kept)


def test_floor_of_a_rate_refuses_that_share_by_itself(
    policied: Policied, acme: httpx.Client
) -> None:
    calibration = load_calibration(calibration_path(policied.model, "default"))
    safety = calibration.names.index("safety")
    own = calibration.margins[calibration.category == safety, safety]
    for asked in ("never", 0.01, {"bias": -3}):
        dials = {"policy": "rated", "categories": {"safety": asked}}
        body = {"inputs": [{"messages": [QUESTION]}], "refusal": dials}
        (entry,) = acme.post(SCORE, json=body).json()["data"]
        decided = entry["decisions"]["safety"]
        assert decided["clamped"] == "floor"
        assert np.mean(own + decided["bias"] >= 0) == pytest.approx(0.9, abs=1 / len(own))


# which policy


def test_tenant_chooses_among_its_own_policies(acme: httpx.Client) -> None:
    lab = {**ALL_NEVER}
    in_body = {**CHAT_BODY, "refusal": {"policy": "lab", "categories": lab}}
    assert decision(acme.post(CHAT, json=in_body)) == "respond"
    by_header = acme.post(
        CHAT,
        json={**CHAT_BODY, "refusal": {"categories": lab}},
        headers={"x-refusal-policy": "lab"},
    )
    assert decision(by_header) == "respond"


def test_policies_of_others_are_403_whether_they_exist_or_not(acme: httpx.Client) -> None:
    bodies = {**ROUTES, SCORE: {"inputs": [{"messages": [QUESTION]}]}}
    for path, body in bodies.items():
        messages = set()
        for name in ("strict", "absent"):
            in_body = acme.post(path, json={**body, "refusal": {"policy": name}})
            in_header = acme.post(path, json=body, headers={"x-refusal-policy": name})
            for answer in (in_body, in_header):
                assert answer.status_code == 403, path
                messages.add(answer.json()["error"]["message"].replace(name, "NAME"))
        assert len(messages) == 1, path


# reading the file again


def test_changed_file_is_in_force_without_a_restart(policied: Policied, acme: httpx.Client) -> None:
    asked = {**CHAT_BODY, "refusal": {"categories": ALL_NEVER}}
    assert decision(acme.post(CHAT, json=asked)) == "refuse"
    try:
        policied.file.write_text(NO_FLOOR)
        until(lambda: decision(acme.post(CHAT, json=asked)) == "respond")
        reloads = policied.server.metric(BAD_RELOADS)
        policied.file.write_text(FILE.replace("bias: 60", "bias: much"))
        until(lambda: policied.server.metric(BAD_RELOADS) == reloads + 1)
        assert policied.server.metric("rheostat_policy_file_valid") == 0
        assert decision(acme.post(CHAT, json=asked)) == "respond"
        assert "policies.yaml:3: policies.desk.floors.safety" in policied.server.log.read_text()
    finally:
        policied.file.write_text(FILE)
        os.kill(policied.server.process.pid, signal.SIGHUP)
        until(lambda: decision(acme.post(CHAT, json=asked)) == "refuse")
    assert policied.server.metric("rheostat_policy_file_valid") == 1


def test_hang_up_reads_the_file_again(policied: Policied) -> None:
    name = 'rheostat_policy_reloads_total{model_name="demo",result="ok"}'
    before = policied.server.metric(name)
    os.kill(policied.server.process.pid, signal.SIGHUP)
    until(lambda: policied.server.metric(name) == before + 1)


# what is told


def test_decisions_are_counted_by_policy(policied: Policied, acme: httpx.Client) -> None:
    asked = {**CHAT_BODY, "refusal": {"categories": {"safety": "never"}}}
    clamped = (
        'rheostat_clamped_dials_total{bound="floor",category="safety",model_name="demo",'
        'policy="desk"}'
    )
    before = policied.server.metric(clamped)
    decision(acme.post(CHAT, json=asked))
    assert policied.server.metric(clamped) == before + 1
    decided = (
        'rheostat_decisions_total{category="safety",decision="refuse",model_name="demo",'
        'policy="desk",rule="greedy"}'
    )
    assert policied.server.metric(decided) > 0


def test_trace_has_a_line_a_choice_and_no_text(policied: Policied, acme: httpx.Client) -> None:
    asked = {"categories": {"safety": 0.25}, "decision": "sample"}
    body = {**CHAT_BODY, "n": 2, "temperature": 1, "refusal": asked}
    answer = acme.post(CHAT, json=body)
    decision(answer)
    request_id = answer.json()["id"]

    def lines() -> list[dict[str, Any]]:
        written = [json.loads(line) for line in policied.trace.read_text().splitlines()]
        return [line for line in written if line["request_id"] == request_id]

    until(lambda: len(lines()) == 2)
    for choice, line in enumerate(lines()):
        assert line["choice"] == choice
        assert (line["tenant"], line["policy"], line["route"]) == ("acme", "desk", CHAT)
        assert line["asked"]["decision"] == "sample"
        assert line["asked"]["categories"]["safety"]["bias"] == pytest.approx(-1.0986, abs=1e-4)
        assert line["effective"]["decision"] == "greedy"
        assert line["effective"]["bias"]["safety"] == 60
        assert line["clamped"] == {"safety": "floor"}
        assert (line["decision"], line["category"]) == ("refuse", "safety")
    assert "France" not in policied.trace.read_text()
    assert ACME not in policied.trace.read_text()
