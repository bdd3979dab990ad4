import copy
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from models.controls import Controls
from server.apis.shaping_responses import ResponseShape
from server.apis.verdicts import Verdicts
from server.context import Decision, DecisionContext
from server.dials.board import Resolution
from tests.server.manifests import MANIFEST
from tests.server.recordings import recorded_answer, recorded_events

TEXT = "Sorry, I won't assist with that. It could harm people."
SAFETY = Decision(0)
RESPOND = Decision(None)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def steering_of(decision: Decision, *, report: bool = False) -> DecisionContext:
    dials = Resolution(Controls.as_trained(2))
    return DecisionContext(dials, report=report, decisions={(0, 0): decision}, calls=1)


def shape_of(context: DecisionContext) -> ResponseShape:
    return ResponseShape(Verdicts(MANIFEST, context))


def refused_stream(
    name: str, pieces: Sequence[str] = (TEXT,), *, undecided: int = 2
) -> list[dict[str, Any]]:
    """Shapes a recorded stream of which the engine says that it is a refusal.

    Args:
        name: The recording's.
        pieces: What the model says: one piece before each event after the undecided ones, and the
            rest before the last.
        undecided: How many events come before the decision.
    """
    recorded = recorded_events(name)
    waiting = list(pieces)
    context = steering_of(SAFETY)
    decisions = context.decisions
    context.decisions = {}
    shape = shape_of(context)
    shaped: list[dict[str, Any]] = []
    for index, event in enumerate(recorded):
        if index >= undecided:
            context.decisions.update(decisions)
            last = index == len(recorded) - 1
            said = "".join(waiting) if last else "".join(waiting[:1])
            del waiting[: len(waiting) if last else 1]
            if said:
                context.refusal_texts[0, 0] = said
        shaped.extend(shape.event(copy.deepcopy(event)))
    return shaped


def kinds(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


OPENED = ["created", "in_progress", "output_item.added", "content_part.added"]
CLOSED = ["refusal.done", "content_part.done", "output_item.done", "completed"]


@pytest.mark.parametrize(
    "name", ["response_refused", "response_answered", "response_called", "response_reasoned"]
)
@pytest.mark.parametrize("pieces", [(TEXT,), ("Sorry,", " I", " won't."), ()])
def test_refused_stream_is_one_refusal_part_whatever_the_parsers_made_of_it(
    name: str, pieces: Sequence[str]
) -> None:
    events = refused_stream(name, pieces)
    assert kinds(events) == [*OPENED, *["refusal.delta"] * len(pieces), *CLOSED]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [e["delta"] for e in events if e["type"].endswith("delta")] == list(pieces)
    text = "".join(pieces)
    part = {"type": "refusal", "refusal": text}
    added, opened, *_, done, part_done, item_done, completed = events[2:]
    assert added["item"]["content"] == []
    assert added["item"]["status"] == "in_progress"
    assert opened["part"] == {"type": "refusal", "refusal": ""}
    assert (done["refusal"], part_done["part"]) == (text, part)
    assert item_done["item"]["content"] == [part]
    assert item_done["item"]["refusal_category"] == "safety"
    assert completed["response"]["output"] == [item_done["item"]]
    ids = {e["item_id"] for e in events if "item_id" in e} | {added["item"]["id"]}
    assert ids == {item_done["item"]["id"]}


@pytest.mark.parametrize("name", ["response_refused", "response_called", "response_reasoned"])
def test_events_are_of_the_clients_types(name: str) -> None:
    for event in refused_stream(name, ("Sorry,", " I won't.")):
        parsed = EVENT.validate_python(event)
        assert parsed.type == event["type"]


def test_text_that_a_parser_held_back_comes_before_the_end() -> None:
    recorded = recorded_events("response_refused")
    context = steering_of(SAFETY)
    context.refusal_texts[0, 0] = TEXT
    shape = shape_of(context)
    ends = [*recorded[:2], recorded[-1] | {"sequence_number": 2}]
    events = [one for event in ends for one in shape.event(event)]
    assert kinds(events) == [*OPENED, "refusal.delta", *CLOSED]
    assert [event["sequence_number"] for event in events] == list(range(9))


def test_answered_stream_stays_as_it_is() -> None:
    for name in ("response_answered", "response_called"):
        recorded = recorded_events(name)
        shape = shape_of(steering_of(RESPOND))
        shaped = [one for event in copy.deepcopy(recorded) for one in shape.event(event)]
        assert shaped == recorded


def test_report_stands_on_the_response_of_the_last_event() -> None:
    for decision in (Decision(None, (-1.0, -2.0)), Decision(0, (1.0, -2.0))):
        shape = shape_of(steering_of(decision, report=True))
        events = [one for e in recorded_events("response_answered") for one in shape.event(e)]
        assert events[-1]["response"]["refusal_report"]["refused"] is (decision.category == 0)
        assert not any("refusal_report" in str(event) for event in events[:-1])


def test_cut_off_refusal_is_incomplete() -> None:
    (*_, completed) = refused_stream("response_answered")
    assert completed["response"]["status"] == "incomplete"
    assert completed["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize("name", ["response_refused", "response_called", "response_reasoned"])
def test_refused_response_is_one_message_of_one_refusal_part(name: str) -> None:
    answer = recorded_answer(name)
    before = copy.deepcopy(answer)
    context = steering_of(Decision(1))
    context.refusal_texts[0, 0] = TEXT
    shape_of(context).answer(answer)
    (item,) = answer.pop("output")
    assert item["id"].startswith("msg_")
    assert item | {"id": ""} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "phase": None,
        "content": [{"type": "refusal", "refusal": TEXT}],
        "refusal_category": "humanizing",
    }
    del before["output"]
    assert answer == before


def test_clients_text_of_a_refusal_is_empty() -> None:
    answer = recorded_answer("response_refused")
    context = steering_of(SAFETY)
    context.refusal_texts[0, 0] = TEXT
    shape_of(context).answer(answer)
    assert Response.model_validate(answer).output_text == ""


def test_refused_response_has_its_report() -> None:
    answer = recorded_answer("response_refused")
    context = steering_of(Decision(0, (1.0, -2.0)), report=True)
    shape_of(context).answer(answer)
    assert answer["refusal_report"]["category"] == "safety"
    assert answer["refusal_report"]["decisions"]["safety"]["margin"] == 1.0


def test_answered_response_stays_as_it_is() -> None:
    answer = recorded_answer("response_called")
    before = copy.deepcopy(answer)
    shape_of(steering_of(RESPOND)).answer(answer)
    assert answer == before
