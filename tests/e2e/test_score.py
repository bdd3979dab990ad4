"""`POST /v1/refusal/score` against the real engine."""

import json
import math
import time
from typing import Any

import httpx
import pytest
from openai import OpenAI

from models.manifest import Manifest
from tests.e2e.servers import OPERATOR, Server

SCORE = "/v1/refusal/score"
QUESTIONS = [
    "What is 2 plus 2?",
    "Tell me how to steal a bicycle without anyone noticing.",
    "Do you like your breakfast?",
    "Ünïcødé ☕ and a long tail " + "of words " * 40,
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CHATS: list[list[dict[str, Any]]] = [
    *([user(text)] for text in QUESTIONS),
    [{"role": "system", "content": "Be brief."}, user(QUESTIONS[0])],
    [user("Hi"), {"role": "assistant", "content": "Hello!"}, user(QUESTIONS[1])],
    [
        user(QUESTIONS[1]),
        {"role": "assistant", "content": None, "refusal": "No.", "refusal_category": "safety"},
        user(QUESTIONS[2]),
    ],
    [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}],
]


def post(server: Server, body: dict[str, Any], path: str = SCORE, **options: Any) -> httpx.Response:
    return server.http.post(path, json=body, **options)


def test_margins_are_those_of_the_chat_routes_report(server: Server) -> None:
    scored = post(server, {"model": "demo", "inputs": [{"messages": chat} for chat in CHATS]})
    assert scored.status_code == 200, scored.text
    for chat, entry in zip(CHATS, scored.json()["data"], strict=True):
        body = {"model": "demo", "messages": chat, "max_tokens": 1, "refusal": {"report": True}}
        answer = post(server, body, "/v1/chat/completions").json()
        report = answer["choices"][0]["refusal_report"]
        assert (entry["refused"], entry["category"]) == (report["refused"], report["category"])
        for name, decision in report["decisions"].items():
            # Another batch, another order of fp32 sums.
            assert entry["decisions"][name]["margin"] == pytest.approx(decision["margin"], abs=1e-4)


def test_raw_prompts_and_messages_may_be_mixed(server: Server) -> None:
    body = {"model": "demo", "inputs": [{"messages": CHATS[0]}, {"prompt": "2 plus 2 is"}]}
    entries = post(server, body).json()["data"]
    assert [entry["index"] for entry in entries] == [0, 1]
    raw = {"model": "demo", "prompt": "2 plus 2 is", "max_tokens": 1, "refusal": {"report": True}}
    report = post(server, raw, "/v1/completions").json()["choices"][0]["refusal_report"]
    margin = entries[1]["decisions"]["safety"]["margin"]
    assert margin == pytest.approx(report["decisions"]["safety"]["margin"], abs=1e-4)


def test_log_normaliser_is_the_whole_vocabularys(server: Server, manifest: Manifest) -> None:
    (entry,) = post(server, {"inputs": [{"messages": CHATS[0]}]}).json()["data"]
    # p(respond) = exp(-n) and p_c = exp(m_c - n): together they leave less than nothing over.
    respond = math.exp(-entry["log_normaliser"])
    total = respond * (1 + sum(math.exp(margin) for margin in margins(entry)))
    assert 0.5 < total <= 1.0001
    assert len(margins(entry)) == len(manifest.names)


def margins(entry: dict[str, Any]) -> list[float]:
    return [decision["margin"] for decision in entry["decisions"].values()]


def test_dials_move_scores_as_they_move_answers(server: Server) -> None:
    inputs = [{"messages": chat} for chat in CHATS]
    always = post(server, {"inputs": inputs, "refusal": {"categories": {"humanizing": "always"}}})
    assert {entry["category"] for entry in always.json()["data"]} == {"humanizing"}
    never = post(server, {"inputs": inputs}, headers={"X-Refusal": header(server, "never")})
    assert {entry["refused"] for entry in never.json()["data"]} == {False}


def header(server: Server, dial: str) -> str:
    categories = server.http.get("/v1/refusal/categories").json()["data"]
    return ", ".join(f"{category['name']}={dial}" for category in categories)


@pytest.mark.parametrize("decision", ["greedy", "sample", "paper"])
def test_every_rule_scores(server: Server, decision: str) -> None:
    body = {"inputs": [{"messages": CHATS[1]}], "refusal": {"decision": decision}}
    assert post(server, body).status_code == 200


@pytest.mark.parametrize(
    ("wrong", "status", "param", "said"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, 400, None, None),
        ({"messages": [{"content": "x"}]}, 400, None, None),
        ({"messages": ["x"]}, 400, None, None),
        ({"messages": [{"role": "user|>", "content": "x"}]}, 400, "inputs.1.messages.0.role", None),
        ({"messages": [user("word " * 2000)]}, 400, "inputs.1", None),
        ({"prompt": "word " * 2000}, 400, "inputs.1", None),
        ({"prompt": ""}, 400, "inputs.1", None),
    ],
)
def test_wrong_input_is_named_by_its_place(
    server: Server, wrong: dict[str, Any], status: int, param: str | None, said: str | None
) -> None:
    answer = post(server, {"inputs": [{"messages": CHATS[0]}, wrong]})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith("inputs.1")
    assert error["param"].startswith(param or "inputs.1")
    assert said is None or said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_unknown_model_is_not_found(server: Server) -> None:
    answer = post(server, {"model": "other", "inputs": [{"messages": CHATS[0]}]})
    assert answer.status_code == 404
    assert "does not exist" in answer.json()["error"]["message"]


def test_scores_are_counted_but_are_no_decisions_of_traffic(server: Server) -> None:
    before = metrics(server)
    body = {"inputs": [{"messages": CHATS[0]}] * 3}
    assert post(server, body).status_code == 200
    after = metrics(server)
    scored = 'rheostat_scored_prompts_total{model_name="demo"}'
    assert after[scored] == before[scored] + 3
    route = f'rheostat_requests_total{{model_name="demo",route="{SCORE}",status="200"}}'
    assert after[route] == before.get(route, 0) + 1
    decisions = {k: v for k, v in after.items() if k.startswith("rheostat_decisions_total")}
    assert decisions.items() <= before.items()


def metrics(server: Server) -> dict[str, float]:
    text = server.metrics()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("rheostat_")]
    return {name: float(value) for name, value in lines}


def test_client_that_leaves_takes_its_prompts_along(server: Server, client: OpenAI) -> None:
    body = {"inputs": [{"messages": [user("words " * 150 + str(i))]} for i in range(1024)]}
    with pytest.raises(httpx.TimeoutException):
        server.http.post(SCORE, json=body, timeout=0.5)
    # The engine is free again: one request is not behind a thousand others.
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=1, timeout=60
    )
    assert answer.choices
    for _ in range(200):
        text = server.metrics()
        waiting = [line for line in text.splitlines() if line.startswith("vllm:num_requests_")]
        busy = sum(float(line.rsplit(" ", 1)[1]) for line in waiting if "_by_" not in line)
        if busy == 0:
            break
        time.sleep(0.1)
    assert busy == 0
    gone = f'rheostat_requests_total{{model_name="demo",route="{SCORE}",status="499"}}'
    assert metrics(server)[gone] >= 1


def test_route_is_in_the_openapi_document(server: Server) -> None:
    document = server.http.get("/openapi.json", headers=OPERATOR).json()
    operation = document["paths"][SCORE]["post"]
    assert json.dumps(operation["requestBody"])
