import copy
import json
from typing import Any

import pytest

from server.apis.shaping import Shaper
from server.apis.verdicts import Verdicts
from server.context import Decision, DecisionContext
from tests.server.contexts import context_of, context_of_calls
from tests.server.manifests import MANIFEST
from tests.server.recordings import recorded_answer, recorded_events

RESPOND = Decision(None)
SAFETY = Decision(0)
HUMANIZING = Decision(1)


def shaper_for(context: DecisionContext) -> Shaper:
    return Shaper(Verdicts(MANIFEST, context))


def shaper_of(
    *decisions: Decision, echo: bool = False, report: bool = False, in_content: bool = False
) -> Shaper:
    context = context_of(*decisions, report=report, in_content=in_content)
    return Shaper(Verdicts(MANIFEST, context), echo=echo)


def chat(*contents: Any, **fields: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
                **fields,
            }
            for index, content in enumerate(contents)
        ],
    }


def messages(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice["message"] for choice in answer["choices"]]


def test_refused_message_has_its_text_in_refusal() -> None:
    answer = shaper_of(HUMANIZING).shape_answer(chat("I am a program."))
    assert messages(answer) == [
        {
            "role": "assistant",
            "content": None,
            "refusal": "I am a program.",
            "refusal_category": "humanizing",
        }
    ]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_answered_message_stays_as_it_is() -> None:
    before = chat("Yes.", "")
    assert shaper_of(RESPOND, RESPOND).shape_answer(copy.deepcopy(before)) == before


def test_choices_are_shaped_each_by_its_own_decision() -> None:
    shaped = messages(shaper_of(RESPOND, SAFETY, HUMANIZING).shape_answer(chat("a", "b", "c")))
    assert [m.get("refusal") for m in shaped] == [None, "b", "c"]
    assert [m["content"] for m in shaped] == ["a", None, None]
    assert [m.get("refusal_category") for m in shaped] == [None, "safety", "humanizing"]


def test_refusal_under_a_forced_tool_is_no_tool_call() -> None:
    answer = chat("", finish_reason="tool_calls")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "I can't."}}
    messages(answer)[0]["tool_calls"] = [call]
    context = context_of(SAFETY)
    context.refusal_texts[0, 0] = "I can't."
    shaped = shaper_for(context).shape_answer(answer)
    assert messages(shaped) == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [],
            "refusal": "I can't.",
            "refusal_category": "safety",
        }
    ]
    assert shaped["choices"][0]["finish_reason"] == "stop"


def test_tool_call_of_an_answer_stays() -> None:
    answer = chat(None, finish_reason="tool_calls")
    messages(answer)[0]["tool_calls"] = [{"function": {"name": "f", "arguments": "{}"}}]
    before = copy.deepcopy(answer)
    assert shaper_of(RESPOND).shape_answer(answer) == before


def test_other_objects_pass() -> None:
    for answer in ({"object": "list", "data": []}, {"type": "error", "error": {}}, {}):
        before = copy.deepcopy(answer)
        assert shaper_of(SAFETY).shape_answer(answer) == before


def test_echoed_message_loses_its_control_token() -> None:
    answer = shaper_of(RESPOND, echo=True).shape_answer(chat("[respond]Once upon a time"))
    assert messages(answer) == [{"role": "assistant", "content": "Once upon a time"}]
    refused = shaper_of(SAFETY, echo=True).shape_answer(chat("[refuse:safety]I will not"))
    assert messages(refused)[0]["refusal"] == "I will not"


def chunk(index: int = 0, **delta: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": index, "delta": delta, "finish_reason": None}],
    }


def deltas(shaper: Shaper, *chunks: dict[str, Any]) -> list[dict[str, Any]]:
    shaped = [shaper.shape_event(copy.deepcopy(one))[0] for one in chunks]
    return [one["choices"][0]["delta"] for one in shaped]


def test_refused_stream_has_its_text_in_refusal_and_its_category_once() -> None:
    stream = [chunk(role="assistant", content=""), chunk(content="No"), chunk(content="."), chunk()]
    assert deltas(shaper_of(SAFETY), *stream) == [
        {"role": "assistant", "content": None, "refusal": "", "refusal_category": "safety"},
        {"content": None, "refusal": "No"},
        {"content": None, "refusal": "."},
        {},
    ]


def test_refusal_in_content_has_its_text_in_both_fields() -> None:
    spoken = [{"token": "No", "logprob": -0.5}]
    answer = chat("I am a program.", "Yes.", logprobs={"content": spoken})
    shaped = shaper_of(HUMANIZING, RESPOND, in_content=True).shape_answer(answer)
    assert messages(shaped) == [
        {
            "role": "assistant",
            "content": "I am a program.",
            "refusal": "I am a program.",
            "refusal_category": "humanizing",
        },
        {"role": "assistant", "content": "Yes."},
    ]
    assert shaped["choices"][0]["logprobs"] == {"content": spoken, "refusal": spoken}


def test_streamed_refusal_in_content_has_its_text_in_both_fields() -> None:
    stream = [chunk(role="assistant", content=""), chunk(content="No"), chunk()]
    assert deltas(shaper_of(SAFETY, in_content=True), *stream) == [
        {"role": "assistant", "content": "", "refusal": "", "refusal_category": "safety"},
        {"content": "No", "refusal": "No"},
        {},
    ]


def test_text_of_a_refusal_that_a_parser_took_stands_in_content_too() -> None:
    answer = chat(None, finish_reason="tool_calls")
    messages(answer)[0]["tool_calls"] = [{"function": {"name": "f", "arguments": "I can't."}}]
    context = context_of(SAFETY, in_content=True)
    context.refusal_texts[0, 0] = "I can't."
    (message,) = messages(shaper_for(context).shape_answer(answer))
    assert (message["content"], message["refusal"], message["tool_calls"]) == (
        "I can't.",
        "I can't.",
        [],
    )


def test_answered_stream_stays_as_it_is() -> None:
    stream = [chunk(role="assistant", content=""), chunk(content="Yes"), chunk(content="")]
    assert deltas(shaper_of(RESPOND), *stream) == [one["choices"][0]["delta"] for one in stream]


def test_choice_decided_after_the_first_chunk_still_says_its_category_once() -> None:
    context = context_of(SAFETY)
    shaper = shaper_for(context)
    assert deltas(shaper, chunk(1, role="assistant", content="")) == [{"role": "assistant"}]
    context.decisions[0, 1] = HUMANIZING
    assert deltas(shaper, chunk(1, content="No"), chunk(1, content=".")) == [
        {"content": None, "refusal": "No", "refusal_category": "humanizing"},
        {"content": None, "refusal": "."},
    ]


def test_usage_and_error_chunks_pass() -> None:
    for one in (
        {"object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}},
        {"error": {"message": "x"}},
    ):
        before = copy.deepcopy(one)
        assert shaper_of(SAFETY, report=True).shape_event(one) == [before]


def test_forced_tool_stream_of_a_refusal_is_no_tool_call() -> None:
    call = {"index": 0, "function": {"arguments": "No"}}
    context = context_of(SAFETY)
    shaper = shaper_for(context)
    context.refusal_texts[0, 0] = "No"
    assert deltas(shaper, chunk(role="assistant", content=""), chunk(tool_calls=[call])) == [
        {"role": "assistant", "content": None, "refusal": "", "refusal_category": "safety"},
        {"content": None, "refusal": "No"},
    ]


def test_text_that_a_parser_held_back_comes_with_the_last_chunk() -> None:
    context = context_of(SAFETY)
    shaper = shaper_for(context)
    opening = chunk(role="assistant", content="")
    context.refusal_texts[0, 0] = "I can't help."
    last = chunk()
    last["choices"][0]["finish_reason"] = "tool_calls"
    assert deltas(shaper, opening, last)[1] == {"content": None, "refusal": "I can't help."}


def test_reasoning_of_a_refusal_is_its_text() -> None:
    answer = chat(None)
    messages(answer)[0]["reasoning"] = "I can't"
    context = context_of(SAFETY)
    context.refusal_texts[0, 0] = "I can't"
    (message,) = messages(shaper_for(context).shape_answer(answer))
    assert message["refusal"] == "I can't"
    assert message["reasoning"] is None


@pytest.mark.parametrize(
    ("shaper", "needed"),
    [
        (shaper_of(), False),
        (shaper_of(RESPOND, RESPOND), False),
        (shaper_of(RESPOND, SAFETY), True),
        (shaper_of(RESPOND, report=True), True),
        (shaper_of(RESPOND, echo=True), True),
    ],
)
def test_shaping_is_needed_only_where_something_differs(shaper: Shaper, needed: bool) -> None:
    assert shaper.needed is needed


def test_headers_hold_one_value_a_choice_in_order() -> None:
    context = context_of_calls({(1, 0): HUMANIZING, (0, 1): SAFETY, (0, 0): RESPOND})
    assert shaper_for(context).headers() == [
        (b"x-refusal-decision", b"respond, refuse, refuse"),
        (b"x-refusal-category", b"none, safety, humanizing"),
    ]
    assert shaper_of().headers() == []


def reported(margins: tuple[float, float], category: int | None = None) -> Decision:
    return Decision(category, margins)


def test_refused_completion_keeps_its_text_beside_its_report() -> None:
    answer = {"object": "text_completion", "choices": [{"index": 0, "text": "No."}]}
    shaper = shaper_of(reported((1.0, -1.0), 0), report=True)
    (choice,) = shaper.shape_answer(answer)["choices"]
    assert (choice["text"], choice["refusal_report"]["category"]) == ("No.", "safety")


def test_report_is_in_the_first_chunk_of_each_choice_only() -> None:
    shaper = shaper_of(reported((1.0, 1.0), 0), reported((-1.0, -1.0)), report=True)
    events = [shaper.shape_event(chunk(index, content="x")) for index in (0, 1, 0, 1)]
    shaped = [event["choices"][0] for (event,) in events]
    assert ["refusal_report" in choice for choice in shaped] == [True, True, False, False]
    assert shaped[1]["refusal_report"]["refused"] is False


def test_headers_are_left_out_where_proxies_would_refuse_them() -> None:
    assert len(shaper_of(*[RESPOND] * 64).headers()) == 2
    assert shaper_of(*[RESPOND] * 65).headers() == []


def test_log_probabilities_of_a_refusal_are_the_refusals() -> None:
    spoken = [{"token": "No", "logprob": -0.5}]
    answer = chat("No", logprobs={"content": spoken})
    (choice,) = shaper_of(SAFETY).shape_answer(answer)["choices"]
    assert choice["logprobs"] == {"content": None, "refusal": spoken}
    answered = chat("Yes", logprobs={"content": spoken})
    (choice,) = shaper_of(RESPOND).shape_answer(answered)["choices"]
    assert choice["logprobs"] == {"content": spoken}


@pytest.mark.parametrize(
    "name", ["response_refused", "message_refused", "response_called", "message_reasoned"]
)
def test_every_api_finds_its_own_shape(name: str) -> None:
    shaped = shaper_of(SAFETY).shape_answer(recorded_answer(name))
    assert "refusal" in json.dumps(shaped)
    shaper = shaper_of(SAFETY)
    if name != "response_called":
        events = [one for e in recorded_events(name) for one in shaper.shape_event(e)]
        assert "refusal" in json.dumps(events)


@pytest.mark.parametrize("name", ["response_answered", "response_called", "message_answered"])
def test_answers_of_every_api_stay_as_they_are(name: str) -> None:
    shaper = shaper_of(RESPOND)
    events = [{"type": "ping"}, *recorded_events(name)]
    assert [one for e in copy.deepcopy(events) for one in shaper.shape_event(e)] == events
    assert shaper.shape_answer(recorded_answer(name)) == recorded_answer(name)


@pytest.mark.parametrize("name", ["response_refused", "message_refused"])
def test_refusals_of_every_api_have_their_report(name: str) -> None:
    answer = shaper_of(reported((1.0, -2.0), 0), report=True).shape_answer(recorded_answer(name))
    assert answer["refusal_report"]["category"] == "safety"
    assert answer["refusal_report"]["decisions"]["safety"]["margin"] == 1.0
