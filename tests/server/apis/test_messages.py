import copy
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from models.errors import RequestError
from server.apis.messages import MessageShape, annotate_messages
from server.apis.verdicts import Verdicts
from server.context import Decision, DecisionContext
from tests.server.contexts import context_of
from tests.server.manifests import MANIFEST
from tests.server.recordings import recorded_answer, recorded_events

ANSWER = "[respond]"
SAFETY = "[refuse:safety]"
HUMANIZING = "[refuse:humanizing]"
CALL = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
TEXT = "Sorry, I won't assist with that. It could harm people."
STOPPED = {"type": "refusal", "category": "safety", "explanation": None}
REFUSED = Decision(0)
ANSWERED = Decision(None)
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def content_of(content: Any, **fields: Any) -> Any:
    """Returns the content of one assistant turn as vLLM is to read it."""
    turn = {"role": "assistant", "content": content, **fields}
    (annotated,), count = annotate_messages([turn], MANIFEST)
    assert count == 1
    assert annotated.keys() == {"role", "content"}
    return annotated["content"]


@pytest.mark.parametrize(
    ("content", "annotated"),
    [
        ("Yes.", f"{ANSWER}Yes."),
        ("", ANSWER),
        (None, ANSWER),
        ([], [text(ANSWER)]),
        ([text("a"), text("b")], [text(f"{ANSWER}a"), text("b")]),
        # vLLM drops empty text blocks, but not what stands in them after this
        ([text("")], [text(ANSWER)]),
        # thinking and calls are rendered apart from the text
        ([THINKING, text("a")], [THINKING, text(f"{ANSWER}a")]),
        ([CALL], [text(ANSWER), CALL]),
        ([THINKING, CALL], [text(ANSWER), THINKING, CALL]),
        ([text("a"), CALL], [text(f"{ANSWER}a"), CALL]),
        ([text("No.", refusal_category="humanizing")], [text(f"{HUMANIZING}No.")]),
        ([text("No.", refusal_category=None)], [text(f"{ANSWER}No.")]),
        ([{"type": "text", "text": 5}], [text(ANSWER), {"type": "text", "text": 5}]),
        (["a"], [text(ANSWER), "a"]),
    ],
)
def test_turn_opens_with_its_token(content: Any, annotated: Any) -> None:
    before = copy.deepcopy(content)
    assert content_of(content) == annotated
    assert content == before, "the client's blocks were changed"


def test_category_of_the_turn_itself_goes_first() -> None:
    assert content_of("No.", refusal_category="safety") == f"{SAFETY}No."
    blocks = [text("No.", refusal_category="humanizing")]
    assert content_of(blocks, refusal_category="safety") == [text(f"{SAFETY}No.")]


def test_other_turns_pass_and_are_not_counted() -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]},
        {"role": "assistant", "content": "a"},
        {"role": "system", "content": "s"},
        "no message",
        {"role": "assistant", "content": [CALL]},
    ]
    annotated, count = annotate_messages(messages, MANIFEST)
    assert count == 2
    assert all(annotated[index] is messages[index] for index in (0, 2, 3))


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"content": "a", "refusal_category": "x"}, "messages.1.refusal_category"),
        (
            {"content": [CALL, text("a", refusal_category=5)]},
            "messages.1.content.1.refusal_category",
        ),
        ({"content": 5}, "messages.1.content"),
    ],
)
def test_what_is_wrong_names_its_path(turn: dict[str, Any], param: str) -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", **turn}]
    with pytest.raises(RequestError) as caught:
        annotate_messages(messages, MANIFEST)
    assert caught.value.param == param


def shape_of(context: DecisionContext) -> MessageShape:
    return MessageShape(Verdicts(MANIFEST, context))


def refused_stream(name: str, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """Shapes a recorded stream; the model says one piece before each event after the first."""
    recorded = recorded_events(name)
    context = context_of(REFUSED)
    shape = shape_of(context)
    shaped: list[dict[str, Any]] = []
    waiting = list(pieces)
    for index, event in enumerate(recorded):
        if index and waiting:
            context.refusal_texts[0, 0] = waiting.pop(0)
        shaped.extend(shape.event(copy.deepcopy(event)))
    return shaped


@pytest.mark.parametrize("name", ["message_refused", "message_answered", "message_reasoned"])
@pytest.mark.parametrize("pieces", [(TEXT,), ("Sorry,", " I", " won't."), ()])
def test_refused_stream_is_one_text_block_whatever_the_parsers_made_of_it(
    name: str, pieces: Sequence[str]
) -> None:
    recorded = recorded_events(name)
    start, opened, *deltas, stopped, told, end = refused_stream(name, pieces)
    assert (start, end) == (recorded[0], recorded[-1])
    block = {"type": "text", "text": "", "refusal_category": "safety"}
    assert opened == {"type": "content_block_start", "index": 0, "content_block": block}
    assert [delta["delta"]["text"] for delta in deltas] == list(pieces)
    assert {delta["index"] for delta in deltas} <= {0}
    assert stopped == {"type": "content_block_stop", "index": 0}
    assert told["delta"] == {
        "stop_reason": "refusal",
        "stop_sequence": None,
        "stop_details": STOPPED,
    }
    assert told["usage"] == recorded[-2]["usage"]


def test_events_are_of_the_clients_types() -> None:
    for event in refused_stream("message_refused", ("Sorry,", " I won't.")):
        stopped = event.get("delta", {}).get("stop_details")
        if stopped:  # the client's own categories are a closed set, which it does not hold us to
            stopped["category"] = None
        assert EVENT.validate_python(event).type == event["type"]


def test_refusal_of_which_vllm_sent_no_block_has_one() -> None:
    recorded = recorded_events("message_refused")
    context = context_of(REFUSED)
    context.refusal_texts[0, 0] = TEXT
    shape = shape_of(context)
    events = [one for event in (recorded[0], *recorded[-2:]) for one in shape.event(event)]
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_report_stands_where_the_message_is_told() -> None:
    for decision in (Decision(None, (-1.0, -2.0)), Decision(0, (1.0, -2.0))):
        shape = shape_of(context_of(decision, report=True))
        events = [one for e in recorded_events("message_answered") for one in shape.event(e)]
        (reported,) = [event for event in events if "refusal_report" in str(event)]
        assert reported["type"] == "message_delta"
        assert reported["delta"]["refusal_report"]["refused"] is (decision.category == 0)


@pytest.mark.parametrize(
    "name", ["message_refused", "message_refused_any_tool", "message_reasoned"]
)
def test_refused_message_is_one_text_block(name: str) -> None:
    answer = recorded_answer(name)
    usage = answer["usage"]
    answer["stop_sequence"] = "x"
    context = context_of(REFUSED)
    context.refusal_texts[0, 0] = TEXT
    shape_of(context).answer(answer)
    assert answer["content"] == [{"type": "text", "text": TEXT, "refusal_category": "safety"}]
    assert answer["stop_reason"] == "refusal"
    assert answer["stop_details"] == STOPPED
    assert "stop_sequence" not in answer
    assert answer["usage"] == usage
    assert Message.model_validate(answer | {"stop_details": None}).stop_reason == "refusal"
