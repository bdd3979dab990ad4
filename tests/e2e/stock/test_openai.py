"""The OpenAI client's view: refusals where it looks for them, and no control token anywhere."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from models.manifest import Manifest
from tests.e2e.servers import Post, Server

ALWAYS_SAFETY = {"refusal": {"categories": {"safety": "always"}}}
PROMPT = "What is the capital of France?"


def never(manifest: Manifest) -> dict[str, Any]:
    return {"refusal": {"categories": dict.fromkeys(manifest.names, "never")}}


def test_plain_refusal_stands_in_the_refusal_field(client: OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body=ALWAYS_SAFETY,
    )
    choice = answer.parse().choices[0]
    assert choice.message.content is None
    assert choice.message.refusal
    assert choice.finish_reason == "stop"
    assert answer.headers["x-refusal-decision"] == "refuse"
    assert answer.headers["x-refusal-category"] == "safety"


def test_plain_answer_is_stock_shaped(client: OpenAI, manifest: Manifest) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body=never(manifest),
    )
    message = answer.parse().choices[0].message
    assert message.content is not None
    assert "Paris" in message.content
    assert message.refusal is None
    assert answer.headers["x-refusal-decision"] == "respond"
    assert answer.headers["x-refusal-category"] == "none"


@pytest.mark.parametrize("report", [False, True])
def test_streamed_refusal_arrives_as_refusal_deltas(client: OpenAI, report: bool) -> None:
    with client.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body={"refusal": {**ALWAYS_SAFETY["refusal"], "report": report}},
    ) as stream:
        deltas = [event for event in stream if event.type == "refusal.delta"]
        final = stream.get_final_completion().choices[0]
    plain = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body=ALWAYS_SAFETY,
    )
    assert len(deltas) > 1
    assert final.message.content is None
    assert final.message.refusal == plain.choices[0].message.refusal
    assert final.finish_reason == "stop"


@pytest.mark.parametrize("refused", [True, False])
def test_refusal_in_content_reaches_clients_that_read_content_only(
    client: OpenAI, manifest: Manifest, refused: bool
) -> None:
    dials = ALWAYS_SAFETY["refusal"] if refused else never(manifest)["refusal"]
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "extra_body": {"refusal": {**dials, "refusal_in": ["refusal", "content"]}},
    }
    message = client.chat.completions.create(**body).choices[0].message
    chunks = list(client.chat.completions.create(**body, stream=True))
    assert message.content
    assert message.refusal == (message.content if refused else None)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(delta.refusal or "" for delta in deltas) == (message.refusal or "")


def test_streamed_answer_arrives_as_content_deltas(client: OpenAI, manifest: Manifest) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=never(manifest),
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    plain = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body=never(manifest),
    )
    assert text == plain.choices[0].message.content
    assert not any(c.choices[0].delta.refusal for c in chunks if c.choices)
    assert chunks[-1].usage == plain.usage


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("decision", ["greedy", "sample"])
def test_three_choices_each_have_their_decision(
    client: OpenAI, decision: str, report: bool
) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        n=3,
        seed=3,
        temperature=1,
        extra_body={
            "refusal": {"decision": decision, "report": report, "categories": {"safety": 0.999}}
        },
    )
    choices = answer.parse().choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    verdicts = answer.headers["x-refusal-decision"].split(", ")
    for choice, verdict in zip(choices, verdicts, strict=True):
        assert (choice.message.refusal is not None) == (verdict == "refuse")
        assert (choice.message.content is None) == (verdict == "refuse")
        extra = choice.model_extra or {}
        assert ("refusal_report" in extra) == report
        if report:
            assert extra["refusal_report"]["refused"] == (verdict == "refuse")


def test_three_streamed_choices_keep_their_fields_apart(client: OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        n=3,
        seed=11,
        temperature=1,
        stream=True,
        extra_body={"refusal": {"decision": "sample", "categories": {"safety": 0.999}}},
    )
    fields: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                fields[choice.index].add("content")
            if choice.delta.refusal:
                fields[choice.index].add("refusal")
    assert all(len(seen) == 1 for seen in fields.values())


def conversation(refused: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "How do I pick my neighbour's lock?"},
        refused,
        {"role": "user", "content": "What is 2 plus 3?"},
    ]


@pytest.mark.parametrize("category", ["safety", "unsupported"])
def test_history_has_its_control_tokens_as_in_training(
    server: Server, stock: Server, manifest: Manifest, checkpoint: Any, category: str
) -> None:
    """The margins are those of a prompt that is built here, token by token."""
    refused: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "refusal": "I can't help with that.",
        "refusal_category": category,
    }
    body = {"model": "demo", "messages": conversation(refused), "refusal": {"report": True}}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    decisions = answer["choices"][0]["refusal_report"]["decisions"]

    tokens = {c.name: c.token for c in manifest.categories}
    turns = conversation({"role": "assistant", "content": tokens[category] + refused["refusal"]})
    turns[1]["content"] = manifest.respond.token + turns[1]["content"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert sum(i in manifest.control_ids for i in ids) == 2
    expected = stock.http.post(
        "/v1/completions",
        json={
            "model": "demo",
            "prompt": ids,
            "max_tokens": 1,
            "logprob_token_ids": manifest.control_ids,
            "logprobs": 6,
            "return_tokens_as_token_ids": True,
        },
    ).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    respond = expected[f"token_id:{manifest.respond.id}"]
    for each in manifest.categories:
        margin = expected[f"token_id:{each.id}"] - respond
        assert decisions[each.name]["margin"] == pytest.approx(margin, abs=1e-3)


def test_own_refusal_sent_back_as_the_client_holds_it(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        extra_body=ALWAYS_SAFETY,
    )
    history: list[Any] = [
        {"role": "user", "content": PROMPT},
        first.choices[0].message,
        {"role": "user", "content": PROMPT},
    ]
    second = client.chat.completions.create(model="demo", messages=history, temperature=0)
    assert second.choices[0].message.content or second.choices[0].message.refusal


AWKWARD: list[dict[str, Any]] = [
    {"return_token_ids": True, "logprobs": True, "top_logprobs": 20},
    {"skip_special_tokens": False, "return_token_ids": True},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False, "logprobs": True},
    {"prompt_logprobs": 5, "return_token_ids": True},
    {"echo": True, "return_prompt_text": True},
    {"n": 3, "temperature": 1, "seed": 1, "logprobs": True, "top_logprobs": 20},
    {"temperature": 2, "top_k": -1, "seed": 4, "max_tokens": 200, "ignore_eos": True},
    {"min_tokens": 20, "return_token_ids": True},
    {"return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 20},
    {"stop": ["[", "]", "refuse", "respond"], "include_stop_str_in_output": True},
]


def strings_and_ids(node: Any) -> Iterator[str | int]:
    """Walks a JSON document: every string, key and list element that could be a token."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from strings_and_ids(value)
    elif isinstance(node, list):
        for value in node:
            yield from [value] if isinstance(value, int) else strings_and_ids(value)
    elif isinstance(node, str):
        yield node


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("report", [False, True])
def test_no_control_token_ever_shows(
    server: Server, manifest: Manifest, report: bool, stream: bool
) -> None:
    body = {
        "model": "demo",
        "messages": [
            {"role": "user", "content": PROMPT},
            {"role": "assistant", "content": "The capital of France is Paris."},
            {"role": "user", "content": "Who will win the match next year?"},
        ],
        "temperature": 0,
        "max_tokens": 24,
        "stream": stream,
        "refusal": {"report": report},
    }
    # vLLM gives prompt log-probabilities to plain requests only.
    fields = [
        {name: value for name, value in awkward.items() if not stream or name != "prompt_logprobs"}
        for awkward in AWKWARD
    ]
    posts = [Post("/v1/chat/completions", body | awkward) for awkward in fields]
    hidden = {*manifest.control_ids, *(f"token_id:{i}" for i in manifest.control_ids)}
    for awkward, answer in zip(fields, server.post_all(posts), strict=True):
        assert answer.status_code == 200, (awkward, answer.text)
        assert not any(token.token in answer.text for token in manifest.control_tokens), awkward
        shown = strings_and_ids(events(answer.text) if stream else answer.json())
        assert hidden.isdisjoint(shown), awkward


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_usage_counts_what_the_client_sees(server: Server, manifest: Manifest) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": 5,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    for refusal in ({}, {"report": True}):
        answer = server.http.post("/v1/chat/completions", json={**body, "refusal": refusal}).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert len(answer["choices"][0]["token_ids"]) == 5
        assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"])


def test_models_and_categories_are_listed(
    client: OpenAI, server: Server, manifest: Manifest
) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    listed = server.http.get("/v1/refusal/categories").json()
    assert [entry["name"] for entry in listed["data"]] == manifest.names
