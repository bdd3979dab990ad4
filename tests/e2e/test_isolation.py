"""What one tenant's requests do to another's, which run in the same batches."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from models.manifest import Manifest
from tests.e2e.policied import PRESS, Policied
from tests.e2e.servers import Post, Server

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
PLAIN = {"model": "demo", "messages": [QUESTION], "max_tokens": 4, "temperature": 0}
ALTERNATIVES = {**PLAIN, "logprobs": True, "top_logprobs": 3}
# The penalty makes each take a decision pass of its own, which gives its margins.
REPORTED = {**PLAIN, "refusal": {"report": True}, "repetition_penalty": 1.1, "max_tokens": 1}
AT_ONCE = 40
LONGEST_WAIT_S = 6.0


def alternatives(answer: httpx.Response) -> list[list[tuple[str, float]]]:
    assert answer.status_code == 200, answer.text
    steps = answer.json()["choices"][0]["logprobs"]["content"]
    return [[(top["token"], top["logprob"]) for top in step["top_logprobs"]] for step in steps]


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, REPORTED), ("/v1/refusal/score", {"inputs": [{"messages": [QUESTION]}] * 8})],
)
def test_margins_of_others_leave_log_probabilities_alone(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    expected = alternatives(server.http.post(CHAT, json=ALTERNATIVES))

    async def beside() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            asking = [client.post(CHAT, json=ALTERNATIVES) for _ in range(AT_ONCE)]
            scoring = [client.post(path, json=body) for _ in range(AT_ONCE)]
            pairs = [request for pair in zip(asking, scoring, strict=True) for request in pair]
            return await asyncio.gather(*pairs)

    answers = asyncio.run(beside())
    assert all(answer.status_code == 200 for answer in answers)
    for answer in answers[::2]:
        for step, alone in zip(alternatives(answer), expected, strict=True):
            assert [token for token, _ in step] == [token for token, _ in alone]
            # Another batch, another order of fp32 sums.
            assert [p for _, p in step] == pytest.approx([p for _, p in alone], abs=1e-3)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations"])
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_that_would_reach_others_are_refused(
    server: Server, path: str, stream: bool
) -> None:
    body = {**PLAIN, "logprobs": True, "logprob_token_ids": [5, 6], "stream": stream}
    if path == "/v1/completions":
        body = {"model": "demo", "prompt": "Hi", "logprobs": 1, "logprob_token_ids": [5, 6]}
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprob_token_ids"
    assert "V1 model runner" in answer.json()["error"]["message"]


def test_score_of_many_prompts_leaves_others_their_time(server: Server) -> None:
    words = [f"Question {i} about " + "bridges and rivers " * 60 for i in range(1024)]
    score = {"inputs": [{"messages": [{"role": "user", "content": text}]} for text in words]}

    async def longest_wait_s() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            scoring = asyncio.create_task(client.post("/v1/refusal/score", json=score))
            longest_s = 0.0
            while not scoring.done():
                started_s = time.monotonic()
                await client.post(CHAT, json={**PLAIN, "max_tokens": 1})
                longest_s = max(longest_s, time.monotonic() - started_s)
            assert scoring.result().status_code == 200, scoring.result().text
            return longest_s

    assert asyncio.run(longest_wait_s()) < LONGEST_WAIT_S


AMBIGUOUS = "root ::= a\na ::= a a a a | a a a | a a | [a-z ]"
ARRAYS = [{"type": "array", "items": {"$ref": "#"}, "minItems": i % 3} for i in range(300)]
TAG = {"type": "structural_tag", "format": {"type": "regex", "pattern": "(.*a){20}"}}
# Each holds xgrammar, vLLM's own first choice, for seconds or minutes in its compiler or its steps.
COSTLY: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "((.?){1,100}){1,100}"}},
    {"structured_outputs": {"regex": "(.*.*.*){1,500}x"}},
    {"structured_outputs": {"regex": "((.{1,100}){1,100}){1,100}"}},
    {"structured_outputs": {"regex": r"(\w*\s*\d*){1,3000}"}},
    {"structured_outputs": {"regex": "((a{1,100}){1,100}){1,100}"}},
    {"structured_outputs": {"choice": [f"v{i}x{i * 7919 % 10007}" for i in range(4000)]}},
    {"structured_outputs": {"grammar": AMBIGUOUS}},
    {"structured_outputs": {"json": {"anyOf": [*ARRAYS, {"type": "integer"}]}}},
    {"structured_outputs": {"json": {"type": "string", "pattern": "^((.?){1,100}){1,100}$"}}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "a",
                "schema": {"enum": [f"v{i}x{i * 7919 % 10007}" for i in range(6000)]},
            },
        }
    },
    {"response_format": TAG},
]


@pytest.mark.parametrize("grammar", COSTLY, ids=lambda grammar: str(grammar)[:60])
def test_grammar_of_one_leaves_others_their_time(
    server: Server, manifest: Manifest, grammar: dict[str, Any]
) -> None:
    never = {"categories": dict.fromkeys(manifest.names, "never")}
    costly = {**PLAIN, **grammar, "refusal": never, "max_tokens": 200, "temperature": 1.0}

    async def waits() -> tuple[list[int], float]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            asked = [asyncio.create_task(client.post(CHAT, json=costly)) for _ in range(2)]
            longest_s = 0.0
            while not all(task.done() for task in asked):
                started_s = time.monotonic()
                plain = await client.post(CHAT, json={**PLAIN, "max_tokens": 1})
                assert plain.status_code == 200
                longest_s = max(longest_s, time.monotonic() - started_s)
            return [task.result().status_code for task in asked], longest_s

    statuses, longest_s = asyncio.run(waits())
    assert set(statuses) <= {200, 400}
    assert longest_s < LONGEST_WAIT_S


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "parameters": SCHEMA}
FORMAT = {"type": "json_schema", "name": "f", "schema": SCHEMA}
MESSAGE = {"model": "demo", "messages": [QUESTION], "max_tokens": 8}
RESPONSE = {"model": "demo", "input": QUESTION["content"], "max_output_tokens": 16}
# Every way by which a grammar reaches the engine.
WAYS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {**PLAIN, "structured_outputs": {"regex": "a"}}),
    (
        CHAT,
        {**PLAIN, "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
    ),
    ("/v1/completions", {"model": "demo", "prompt": "Hi", "structured_outputs": {"choice": ["a"]}}),
    ("/v1/responses", {**RESPONSE, "text": {"format": FORMAT}}),
    ("/v1/responses", {**RESPONSE, "structured_outputs": {"regex": "a"}}),
    (
        "/v1/messages",
        {**MESSAGE, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    (
        "/v1/messages",
        {
            **MESSAGE,
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
        },
    ),
    ("/invocations", {**PLAIN, "structured_outputs": {"regex": "a"}}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_policy_without_grammars_takes_none(policied: Policied, stream: bool) -> None:
    posts = [Post(path, {**body, "stream": stream}) for path, body in WAYS]

    def ask(policy: str) -> list[httpx.Response]:
        key = f"Bearer {PRESS}"
        return policied.server.post_all(posts, **{"authorization": key, "x-refusal-policy": policy})

    for post, answer in zip(posts, ask("free_text"), strict=True):
        assert answer.status_code == 403, (post, answer.text)
        assert "the policy allows no grammars" in answer.json()["error"]["message"]
    for post, answer in zip(posts, ask("prefilled"), strict=True):
        assert answer.status_code == 200, (post, answer.text)
