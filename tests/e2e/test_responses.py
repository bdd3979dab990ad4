"""The Responses API through the OpenAI client: refusal parts, their events, and their history."""

from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from openai.types.responses import ResponseOutputMessage, ResponseOutputRefusal

from models.manifest import Manifest
from tests.e2e.servers import Server

ALWAYS_SAFETY = {"refusal": {"categories": {"safety": "always"}}}
PROMPT = "What is the capital of France?"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def never(manifest: Manifest) -> dict[str, Any]:
    return {"refusal": {"categories": dict.fromkeys(manifest.names, "never")}}


def refusal_of(item: Any) -> str:
    """Returns the text of a message that is one refusal part."""
    assert isinstance(item, ResponseOutputMessage)
    (part,) = item.content
    assert isinstance(part, ResponseOutputRefusal)
    return part.refusal


def test_plain_refusal_is_one_refusal_part(client: OpenAI) -> None:
    raw = client.responses.with_raw_response.create(
        model="demo", input=PROMPT, temperature=0, extra_body=ALWAYS_SAFETY
    )
    response = raw.parse()
    (item,) = response.output
    assert refusal_of(item)
    assert response.status == "completed"
    assert response.output_text == ""
    assert raw.headers["x-refusal-decision"] == "refuse"
    assert raw.headers["x-refusal-category"] == "safety"


def test_plain_answer_is_text(client: OpenAI, manifest: Manifest) -> None:
    response = client.responses.create(
        model="demo", input=PROMPT, temperature=0, extra_body=never(manifest)
    )
    assert "Paris" in response.output_text


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_streamed_refusal_is_the_plain_one(client: OpenAI, report: bool, forced: bool) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": PROMPT, "temperature": 0}
    if forced:
        asked |= {"tools": [TOOL], "tool_choice": "required"}
    plain = client.responses.create(**asked, extra_body=ALWAYS_SAFETY)
    with client.responses.stream(
        **asked, extra_body={"refusal": {**ALWAYS_SAFETY["refusal"], "report": report}}
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.refusal.delta"]
    # vLLM's parser of a forced call tells nothing before its end.
    assert len(deltas) > (0 if forced else 1)
    assert "".join(deltas) == refusal_of(final.output[0]) == refusal_of(plain.output[0])
    assert len(final.output) == len(plain.output) == 1
    assert final.output_text == ""
    assert ("refusal_report" in (final.model_extra or {})) == report


def test_streamed_answer_is_the_plain_one(client: OpenAI, manifest: Manifest) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": PROMPT, "temperature": 0}
    plain = client.responses.create(**asked, extra_body=never(manifest))
    report = {"refusal": {**never(manifest)["refusal"], "report": True}}
    with client.responses.stream(**asked, extra_body=report) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == plain.output_text
    assert final.usage == plain.usage
    assert (final.model_extra or {})["refusal_report"]["refused"] is False


def test_own_refusal_sent_back_as_the_client_holds_it(
    client: OpenAI, server: Server, manifest: Manifest
) -> None:
    first = client.responses.create(
        model="demo",
        input=PROMPT,
        temperature=0,
        extra_body={"refusal": {"categories": {"unsupported": "always"}}},
    )
    told = {"refusal": {"report": True}}
    history: list[Any] = [
        {"role": "user", "content": PROMPT},
        *first.output,
        {"role": "user", "content": "What is 2 plus 3?"},
    ]
    second = client.responses.create(model="demo", input=history, temperature=0, extra_body=told)
    report = (second.model_extra or {})["refusal_report"]

    # the same turns as chat, whose history is held to a prompt built token by token
    turns = [
        {"role": "user", "content": PROMPT},
        {
            "role": "assistant",
            "refusal": refusal_of(first.output[0]),
            "refusal_category": "unsupported",
        },
        {"role": "user", "content": "What is 2 plus 3?"},
    ]
    body = {"model": "demo", "messages": turns, "temperature": 0, **told}
    chat = server.http.post("/v1/chat/completions", json=body).json()
    expected = chat["choices"][0]["refusal_report"]["decisions"]
    for name in manifest.names:
        margin = report["decisions"][name]["margin"]
        assert margin == pytest.approx(expected[name]["margin"], abs=1e-3)


def test_unfinished_last_message_goes_on_or_is_dropped(client: OpenAI, manifest: Manifest) -> None:
    unfinished: Any = [
        {"role": "user", "content": PROMPT},
        {
            "type": "message",
            "role": "assistant",
            "status": "incomplete",
            "content": [{"type": "output_text", "text": "The capital"}],
        },
    ]
    asked: dict[str, Any] = {"model": "demo", "temperature": 0}
    answered = client.responses.create(**asked, input=unfinished, extra_body=never(manifest))
    assert "Paris" in answered.output_text
    refused = client.responses.create(**asked, input=unfinished, extra_body=ALWAYS_SAFETY)
    direct = client.responses.create(**asked, input=PROMPT, extra_body=ALWAYS_SAFETY)
    assert refusal_of(refused.output[0]) == refusal_of(direct.output[0])


@pytest.mark.parametrize(
    "asked",
    [{"background": True}, {"previous_response_id": "resp_1"}],
    ids=lambda asked: str(asked),
)
def test_what_needs_kept_responses_is_refused(client: OpenAI, asked: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="responses are not stored here"):
        client.responses.create(model="demo", input=PROMPT, **asked)


def test_stream_that_the_engine_rejects_does_not_begin(server: Server) -> None:
    body = {"model": "demo", "input": PROMPT, "stream": True, "logit_bias": {"99999999": 1}}
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "logit_bias"
