"""Names that are copied and choices of all prompts together have bounds on every route."""

from typing import Any

import httpx
import pytest

from tests.e2e.attacks import TARGETS, USER
from tests.e2e.servers import Server

BODIES = {target.name: (target.path, target.body()) for target in TARGETS}
BODIES["score"] = ("/v1/refusal/score", {"inputs": [{"messages": [USER]}]})
LONG = "a" * 129


def post(server: Server, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.post(path, json=body, headers=sent)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("field", ["model", "request_id", "session_id", "user", "cache_salt"])
def test_long_name_is_400(server: Server, name: str, field: str) -> None:
    path, body = BODIES[name]
    answer = post(server, path, {**body, field: LONG})
    assert answer.status_code == 400
    assert f"{field}: it has 129 characters" in answer.json()["error"]["message"]
    header = post(server, path, body, x_request_id=LONG)
    assert header.status_code == 400


@pytest.mark.parametrize(
    ("path", "prompts"),
    [
        ("/v1/completions", {"prompt": ["a"] * 33}),
        ("/v1/completions", {"prompt": ["a"] * 33, "use_beam_search": True}),
        ("/invocations", {"prompt": [[300]] * 33}),
        ("/v1/chat/completions/batch", {"messages": [[USER]] * 33}),
    ],
)
def test_choices_of_all_prompts_are_counted(
    server: Server, path: str, prompts: dict[str, Any]
) -> None:
    answer = post(server, path, {"model": "demo", "max_tokens": 1, "n": 4, **prompts})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "n"
    assert "132, and at most 128 here (RHEOSTAT_MAX_CHOICES)" in answer.json()["error"]["message"]


def test_log_probabilities_of_all_prompts_are_counted(server: Server) -> None:
    body = {"model": "demo", "prompt": ["a b c d " * 60] * 8, "max_tokens": 1}
    assert post(server, "/v1/completions", {**body, "prompt_logprobs": 1}).status_code == 200
    answer = post(server, "/v1/completions", {**body, "prompt_logprobs": 20})
    assert answer.status_code == 422
    assert "RHEOSTAT_MAX_LOGPROBS" in answer.json()["error"]["message"]
