"""What one tenant's requests do to another's, which run in the same batches."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.e2e.servers import Server

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
PLAIN = {"model": "demo", "messages": [QUESTION], "max_tokens": 4, "temperature": 0}
ALTERNATIVES = {**PLAIN, "logprobs": True, "top_logprobs": 3}
# Each takes a decision pass of its own for its margins.
REPORTED = {**PLAIN, "refusal": {"report": True}, "repetition_penalty": 1.1, "max_tokens": 1}
AT_ONCE = 40


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
    expected = alternatives(httpx.post(server.url + CHAT, json=ALTERNATIVES, timeout=60))

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
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprob_token_ids"
    assert "V1 model runner" in answer.json()["error"]["message"]
