"""Anthropic's messages through the Anthropic client: stop reason, details, and history."""

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from anthropic.types import TextBlock

from models.manifest import Manifest
from tests.e2e.servers import Server

GREEDY = {"temperature": 0}  # the client itself has no temperature any more
ALWAYS_SAFETY: dict[str, Any] = {**GREEDY, "refusal": {"categories": {"safety": "always"}}}
PROMPT = "What is the capital of France?"
TOOL: Any = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASKED: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": PROMPT}],
}


@pytest.fixture
def anthropic(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def never(manifest: Manifest) -> dict[str, Any]:
    return {**GREEDY, "refusal": {"categories": dict.fromkeys(manifest.names, "never")}}


def text_of(message: Any) -> str:
    (block,) = message.content
    assert isinstance(block, TextBlock)
    return block.text


FORCED = [{}, {"tools": [TOOL], "tool_choice": {"type": "any"}}]


@pytest.mark.parametrize("forced", FORCED, ids=["free", "forced"])
def test_plain_refusal_stops_for_its_category(anthropic: Anthropic, forced: dict[str, Any]) -> None:
    raw = anthropic.messages.with_raw_response.create(**ASKED, **forced, extra_body=ALWAYS_SAFETY)
    message = raw.parse()
    assert message.stop_reason == "refusal"
    assert message.stop_details is not None
    assert message.stop_details.type == "refusal"
    assert str(message.stop_details.category) == "safety"
    assert message.stop_sequence is None
    assert text_of(message)
    assert raw.headers["x-refusal-decision"] == "refuse"
    assert raw.headers["x-refusal-category"] == "safety"


def test_plain_answer_ends_its_turn(anthropic: Anthropic, manifest: Manifest) -> None:
    message = anthropic.messages.create(**ASKED, extra_body=never(manifest))
    assert "Paris" in text_of(message)
    assert message.stop_reason == "end_turn"
    assert message.stop_details is None


@pytest.mark.parametrize("forced", FORCED, ids=["free", "forced"])
@pytest.mark.parametrize("report", [False, True])
def test_streamed_refusal_is_the_plain_one(
    anthropic: Anthropic, report: bool, forced: dict[str, Any]
) -> None:
    plain = anthropic.messages.create(**ASKED, **forced, extra_body=ALWAYS_SAFETY)
    asked = {**GREEDY, "refusal": {**ALWAYS_SAFETY["refusal"], "report": report}}
    with anthropic.messages.stream(**ASKED, **forced, extra_body=asked) as stream:
        events = list(stream)
        message = stream.get_final_message()
    deltas = [event.text for event in events if event.type == "text"]
    # vLLM's parser of a forced call tells nothing before its end.
    assert len(deltas) > (0 if forced else 1)
    assert "".join(deltas) == text_of(message) == text_of(plain)
    assert message.stop_reason == "refusal"
    assert message.stop_details is not None
    assert str(message.stop_details.category) == "safety"
    assert message.usage == plain.usage
    (told,) = [event for event in events if event.type == "message_delta"]
    assert ("refusal_report" in (told.delta.model_extra or {})) == report


def test_report_of_a_plain_answer_stands_on_the_message(
    anthropic: Anthropic, manifest: Manifest
) -> None:
    asked = {**GREEDY, "refusal": {**never(manifest)["refusal"], "report": True}}
    message = anthropic.messages.create(**ASKED, extra_body=asked)
    assert (message.model_extra or {})["refusal_report"]["refused"] is False


def test_own_refusal_sent_back_as_the_client_holds_it(
    anthropic: Anthropic, server: Server, manifest: Manifest
) -> None:
    unsupported = {**GREEDY, "refusal": {"categories": {"unsupported": "always"}}}
    first = anthropic.messages.create(**ASKED, extra_body=unsupported)
    told = {**GREEDY, "refusal": {"report": True}}
    question: Any = {"role": "user", "content": "What is 2 plus 3?"}
    turns: list[Any] = [
        *ASKED["messages"],
        {"role": "assistant", "content": first.content},
        question,
    ]
    second = anthropic.messages.create(**{**ASKED, "messages": turns}, extra_body=told)
    report = (second.model_extra or {})["refusal_report"]

    # the same turns as chat, whose history is held to a prompt built token by token
    refused = {
        "role": "assistant",
        "refusal": text_of(first),
        "refusal_category": "unsupported",
    }
    body = {
        "model": "demo",
        "messages": [*ASKED["messages"], refused, question],
        **told,
    }
    chat = server.http.post("/v1/chat/completions", json=body).json()
    expected = chat["choices"][0]["refusal_report"]["decisions"]
    for name in manifest.names:
        margin = report["decisions"][name]["margin"]
        assert margin == pytest.approx(expected[name]["margin"], abs=1e-3)


def test_turn_of_a_tool_call_only_is_history(anthropic: Anthropic) -> None:
    call: Any = {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}}
    turns: list[Any] = [
        *ASKED["messages"],
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": PROMPT},
    ]
    message = anthropic.messages.create(**{**ASKED, "messages": turns}, tools=[TOOL])
    assert message.stop_reason in ("end_turn", "refusal")
