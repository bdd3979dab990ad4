"""Every field that vLLM's routes know, with values of types that it does not take."""

from typing import Any

import pytest

from tests.e2e.servers import OPERATOR, Post, Server

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


def fields(server: Server, path: str) -> list[str]:
    document = server.http.get("/openapi.json", headers=OPERATOR).json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].rpartition("/")[2]
    return sorted(document["components"]["schemas"][name]["properties"])


# With each fourth value, from another one on for each field, or with all of them.
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", BODIES)
def test_value_of_a_wrong_type_is_no_internal_error(server: Server, path: str, step: int) -> None:
    changed = [
        {**BODIES[path], name: value}
        for number, name in enumerate(fields(server, path))
        for value in WRONG[number % step :: step]
    ]
    answers = server.post_all([Post(path, body) for body in changed])
    assert len(answers) >= 8 * len(WRONG) / step
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
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "structured_outputs"
