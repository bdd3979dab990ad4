"""Every field that vLLM's routes know, with values of types that it does not take."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.e2e.servers import OPERATOR, Server

QUESTION = {"role": "user", "content": "Hi"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [QUESTION], "max_tokens": 1},
    "/v1/chat/completions/batch": {"messages": [[QUESTION]], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 16},
    "/v1/messages": {"messages": [QUESTION], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [QUESTION]},
}
WRONG: list[Any] = ["x", 5, True, [], [1], [None], {"type": 5}, {"json": 5}]
AT_ONCE = 16


def fields(server: Server, path: str) -> list[str]:
    document = httpx.get(server.url + "/openapi.json", headers=OPERATOR, timeout=30).json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    return sorted(document["components"]["schemas"][name]["properties"])


@pytest.mark.parametrize("path", BODIES)
def test_value_of_a_wrong_type_is_no_internal_error(server: Server, path: str) -> None:
    changed = [{**BODIES[path], name: value} for name in fields(server, path) for value in WRONG]

    async def send_all() -> list[httpx.Response]:
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def send(body: dict[str, Any]) -> httpx.Response:
                async with gate:
                    return await client.post(path, json=body)

            return await asyncio.gather(*map(send, changed))

    answers = asyncio.run(send_all())
    assert len(answers) > 8 * len(WRONG) - 1
    failed = [
        (body, answer.text)
        for body, answer in zip(changed, answers, strict=True)
        if answer.is_server_error
    ]
    assert failed == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("value", ["x", 5, [], True], ids=str)
def test_grammar_that_is_no_object_is_told_with_its_path(
    server: Server, path: str, value: Any
) -> None:
    body = {**BODIES[path], "structured_outputs": value}
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "structured_outputs"
