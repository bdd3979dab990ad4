"""What the real server's trace says of denials and scores, and of keys that end."""

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from typing import Any

from models.manifest import load_manifest
from server.policies.credentials import generate_key, hash_key
from tests.e2e.policied import ACME, FILE, SHOP, Policied
from tests.e2e.servers import until

CHAT, SCORE = "/v1/chat/completions", "/v1/refusal/score"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "A secret question?"}]}


def traced(policied: Policied, decision: str) -> list[dict[str, Any]]:
    written = [json.loads(line) for line in policied.trace.read_text().splitlines()]
    return [line for line in written if line["decision"] == decision]


def test_trace_has_a_line_of_what_was_denied_and_no_word_of_it(policied: Policied) -> None:
    sent = {"x-request-id": "denied-1"}
    respond = load_manifest(policied.model).respond.id
    with policied.client(ACME, x_request_id="denied-1") as acme, policied.client(SHOP) as shop:
        for _ in range(3):
            policied.server.http.post(CHAT, json=BODY, headers=sent)
        acme.post(CHAT, json={**BODY, "refusal": {"policy": "strict"}})
        acme.post(CHAT, json={**BODY, "refusal": {"categories": {"a secret": 1}}})
        acme.post(CHAT, json={**BODY, "stream": True, "allowed_token_ids": [respond]})
        shop.post(CHAT, json={**BODY, "refusal": {"categories": {"safety": "never"}}})

    def denied() -> set[tuple[Any, ...]]:
        keys = ("tenant", "route", "status", "code", "param", "count")
        return {tuple(line[key] for key in keys) for line in traced(policied, "denied")}

    expected = {
        ("acme", CHAT, 403, "not_allowed", "refusal.policy", 1),
        ("acme", CHAT, 422, "invalid_request", "refusal.categories", 1),
        ("acme", CHAT, 400, "invalid_request", "allowed_token_ids", 1),
        ("shop", CHAT, 403, "not_allowed", "refusal.categories.safety", 1),
    }
    until(lambda: expected <= denied())
    unknown = [line for line in traced(policied, "denied") if line["status"] == 401]
    assert sum(line["count"] for line in unknown if line["request_id"] == "denied-1") == 3
    assert {line["tenant"] for line in unknown} == {None}
    assert "secret" not in policied.trace.read_text()


def test_trace_has_a_line_of_each_scoring(policied: Policied) -> None:
    inputs = [{"messages": BODY["messages"]}] * 3
    with policied.client(ACME) as acme:
        answer = acme.post(SCORE, json={"inputs": inputs, "refusal": {"policy": "desk"}})
    assert answer.status_code == 200, answer.text

    def scored() -> set[tuple[Any, ...]]:
        keys = ("tenant", "policy", "inputs", "refused")
        return {
            (*(line[key] for key in keys), line["effective"]["bias"]["safety"])
            for line in traced(policied, "scored")
        }

    until(lambda: ("acme", "desk", 3, 3, 60) in scored())


def test_key_ends_by_itself(policied: Policied) -> None:
    key = generate_key()
    ends = datetime.now(UTC) + timedelta(seconds=6)
    entry = f'{{hash: "{hash_key(key)}", expires: {ends:%Y-%m-%dT%H:%M:%S.%f}Z}}'
    try:
        policied.file.write_text(
            FILE.replace(f'"{hash_key(ACME)}"', f'"{hash_key(ACME)}", {entry}')
        )
        os.kill(policied.server.process.pid, signal.SIGHUP)
        with policied.client(key) as client:
            until(lambda: client.get("/v1/models").status_code == 200)
            until(lambda: client.get("/v1/models").status_code == 401)
            error = client.get("/v1/models").json()["error"]
        assert datetime.now(UTC) >= ends
        assert (error["type"], error["code"]) == ("authentication_error", "expired_api_key")
        assert "expired" in error["message"]
    finally:
        policied.file.write_text(FILE)
        os.kill(policied.server.process.pid, signal.SIGHUP)
