import copy
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from models.controls import Controls
from server.apis.shaping_messages import MessageShape
from server.apis.verdicts import Verdicts
from server.context import Decision, DecisionContext
from server.dials.board import Resolution
from tests.server.manifests import MANIFEST
from tests.server.recordings import recorded_answer, recorded_events

TEXT = "Sorry, I won't assist with that. It could harm people."
STOPPED = {"type": "refusal", "category": "safety", "explanation": None}
SAFETY = Decision(0)
RESPOND = Decision(None)
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def steering_of(decision: Decision, *, report: bool = False) -> DecisionContext:
    dials = Resolution(Controls.as_trained(2))
    return DecisionContext(dials, report=report, decisions={(0, 0): decision}, calls=1)


def shape_of(context: DecisionContext) -> MessageShape:
    return MessageShape(Verdicts(MANIFEST, context))


def refused_stream(name: str, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """Shapes a recorded stream; the model says one piece before each event after the first."""
    recorded = recorded_events(name)
    context = steering_of(SAFETY)
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
    context = steering_of(SAFETY)
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


def test_answered_stream_and_pings_stay_as_they_are() -> None:
    ping = {"type": "ping"}
    recorded = [ping, *recorded_events("message_answered")]
    shape = shape_of(steering_of(RESPOND))
    assert [one for e in copy.deepcopy(recorded) for one in shape.event(e)] == recorded


def test_report_stands_where_the_message_is_told() -> None:
    for decision in (Decision(None, (-1.0, -2.0)), Decision(0, (1.0, -2.0))):
        shape = shape_of(steering_of(decision, report=True))
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
    context = steering_of(SAFETY)
    context.refusal_texts[0, 0] = TEXT
    shape_of(context).answer(answer)
    assert answer["content"] == [{"type": "text", "text": TEXT, "refusal_category": "safety"}]
    assert answer["stop_reason"] == "refusal"
    assert answer["stop_details"] == STOPPED
    assert "stop_sequence" not in answer
    assert answer["usage"] == usage
    assert Message.model_validate(answer | {"stop_details": None}).stop_reason == "refusal"


def test_refused_message_has_its_report() -> None:
    answer = recorded_answer("message_refused")
    shape_of(steering_of(Decision(0, (1.0, -2.0)), report=True)).answer(answer)
    assert answer["refusal_report"]["category"] == "safety"


def test_answered_message_stays_as_it_is() -> None:
    answer = recorded_answer("message_answered")
    before = copy.deepcopy(answer)
    shape_of(steering_of(RESPOND)).answer(answer)
    assert answer == before
