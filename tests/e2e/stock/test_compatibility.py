"""What vLLM's server takes, this one takes, whether it answers or refuses."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from models.manifest import Manifest
from tests.e2e.servers import Server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": SCHEMA, "strict": True},
    }
]


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return server.http.post(path, json=body)


def answering(manifest: Manifest) -> dict[str, Any]:
    return {"refusal": {"categories": dict.fromkeys(manifest.names, "never")}}


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_tool_is_called_when_answered_and_not_when_refused(
    server: Server, manifest: Manifest, checkpoint: Path, choice: Any
) -> None:
    # The grammar allows endless white space, and so small a model takes the offer.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    blank = [i for i in range(len(tokenizer)) if not str(tokenizer.decode([i])).strip()]
    body = {
        "logit_bias": {str(i): -100 for i in set(blank) - set(manifest.control_ids)},
        "model": "demo",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 200,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    answered = post(server, "/v1/chat/completions", {**body, **answering(manifest)}).json()
    (call,) = answered["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")

    refusal = {"refusal": {"categories": {"safety": "always"}}}
    refused = post(server, "/v1/chat/completions", {**body, **refusal}).json()["choices"][0]
    assert refused["message"]["refusal"]
    assert refused["message"]["content"] is None
    assert not refused["message"].get("tool_calls")
    assert refused["finish_reason"] == "stop"

    streamed = post(server, "/v1/chat/completions", {**body, **refusal, "stream": True}).text
    chunks = [
        json.loads(line.removeprefix("data: "))["choices"][0]
        for line in streamed.splitlines()
        if line.startswith("data: {")
    ]
    said = "".join(chunk["delta"].get("refusal") or "" for chunk in chunks)
    assert said == refused["message"]["refusal"]
    assert "tool_calls" not in streamed


def test_refused_schema_request_is_text_not_json(server: Server) -> None:
    body = {
        "model": "demo",
        "messages": QUESTION,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}},
        "refusal": {"categories": {"incomplete": "always"}},
    }
    message = post(server, "/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] is None
    assert not message["refusal"].startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dial", ["never", "always"])
def test_each_of_three_choices_is_json_when_answered_and_text_when_refused(
    server: Server, manifest: Manifest, dial: str, stream: bool
) -> None:
    body = {
        "model": "demo",
        "messages": QUESTION,
        "n": 3,
        "temperature": 1,
        "structured_outputs": {"regex": r'\{"city": "(Paris|Rome)"\}'},
        "stream": stream,
        "refusal": {"categories": dict.fromkeys(manifest.names, "never") | {"safety": dial}},
    }
    answer = post(server, "/v1/chat/completions", body)
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    documents = [json.loads(line[6:]) for line in lines] if stream else [answer.json()]
    name = "content" if dial == "never" else "refusal"
    texts = {0: "", 1: "", 2: ""}
    for choice in (choice for document in documents for choice in document["choices"]):
        said = choice["delta" if stream else "message"]
        texts[choice["index"]] += said.get(name) or ""
        assert not said.get("refusal" if dial == "never" else "content")
    for text in texts.values():
        if dial == "never":
            assert json.loads(text)["city"] in ("Paris", "Rome")
        else:
            assert text
            assert not text.startswith("{")


def test_beam_search_decides_once_and_goes_on(server: Server, manifest: Manifest) -> None:
    body = {
        "model": "demo",
        "messages": QUESTION,
        "use_beam_search": True,
        "n": 2,
        "max_tokens": 12,
        "temperature": 0,
    }
    answered = post(server, "/v1/chat/completions", {**body, **answering(manifest)})
    assert answered.status_code == 200, answered.text
    assert "Paris" in answered.json()["choices"][0]["message"]["content"]
    refusal = {"refusal": {"categories": {"safety": "always"}}}
    refused = post(server, "/v1/chat/completions", {**body, **refusal}).json()
    assert all(choice["message"]["content"] is None for choice in refused["choices"])
    assert all(choice["message"]["refusal"] for choice in refused["choices"])


def test_prefilled_turn_goes_on_when_answered_and_is_dropped_when_refused(
    server: Server, manifest: Manifest
) -> None:
    body = {
        "model": "demo",
        "messages": [*QUESTION, {"role": "assistant", "content": "The capital"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
        "temperature": 0,
        "max_tokens": 24,
    }
    answered = post(server, "/v1/chat/completions", {**body, **answering(manifest)})
    assert answered.status_code == 200, answered.text
    assert "Paris" in answered.json()["choices"][0]["message"]["content"]
    refusal = {"refusal": {"categories": {"safety": "always"}}}
    refused = post(server, "/v1/chat/completions", {**body, **refusal}).json()
    direct = post(
        server,
        "/v1/chat/completions",
        {"model": "demo", "messages": QUESTION, "temperature": 0, **refusal},
    ).json()
    message = refused["choices"][0]["message"]
    assert message["content"] is None
    assert message["refusal"] == direct["choices"][0]["message"]["refusal"]


OTHER_ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "What is the capital of France?", "max_tokens": 8}),
    ("/v1/completions", {"prompt": ["One", "Two"], "max_tokens": 8, "n": 2, "seed": 1}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 8, "echo": True, "logprobs": 3}),
    ("/v1/responses", {"input": "What is the capital of France?", "max_output_tokens": 16}),
    ("/v1/messages", {"messages": QUESTION, "max_tokens": 16}),
    ("/invocations", {"messages": QUESTION, "max_tokens": 16}),
    ("/v1/chat/completions/batch", {"messages": [QUESTION, QUESTION], "max_tokens": 8}),
]


@pytest.mark.parametrize(("path", "body"), OTHER_ROUTES, ids=lambda case: str(case)[:60])
def test_every_generating_route_answers_and_hides_its_control_tokens(
    server: Server, manifest: Manifest, path: str, body: dict[str, Any]
) -> None:
    for dial in ("always", "never"):
        refusal = {"categories": dict.fromkeys(manifest.names, "never") | {"safety": dial}}
        answer = post(server, path, {"model": "demo", **body, "refusal": refusal})
        assert answer.status_code == 200, answer.text
        assert not any(token.token in answer.text for token in manifest.control_tokens)
        verdict = "refuse" if dial == "always" else "respond"
        assert set(answer.headers["x-refusal-decision"].split(", ")) == {verdict}


def test_streamed_echo_has_the_prompts_log_probabilities(
    server: Server, stock: Server, manifest: Manifest
) -> None:
    body = {
        "model": "demo",
        "prompt": "What is the capital of France?",
        "echo": True,
        "logprobs": 1,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }

    def prompt_logprobs(answer: httpx.Response) -> list[float | None]:
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        values = [v for choice in choices for v in choice["logprobs"]["token_logprobs"]]
        return values[:-4]

    ours = prompt_logprobs(post(server, "/v1/completions", {**body, **answering(manifest)}))
    theirs = prompt_logprobs(post(stock, "/v1/completions", body))
    assert len(ours) > 4
    assert ours == pytest.approx(theirs, abs=1e-4)
