import copy
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from models.errors import RequestError
from server.apis.responses import ResponseShape, annotate_input, goes_on
from server.apis.verdicts import Verdicts
from server.context import Decision, DecisionContext
from tests.server.contexts import context_of
from tests.server.manifests import MANIFEST
from tests.server.recordings import recorded_answer, recorded_events

ANSWER = "[respond]"
SAFETY = "[refuse:safety]"
HUMANIZING = "[refuse:humanizing]"
USER = {"role": "user", "content": "u"}
TEXT = "Sorry, I won't assist with that. It could harm people."
REFUSED = Decision(0)
ANSWERED = Decision(None)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def said(*texts: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"type": "message", "role": "assistant", "content": parts, **fields}


def refused(text: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "refusal", "refusal": text}
    return {"type": "message", "role": "assistant", "content": [part], **fields}


def reasoned(text: str, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": parts, **fields}


def call(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}


def result(name: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": name, "output": "1"}


def chat_of(items: list[Any]) -> list[dict[str, Any]]:
    """Returns the chat messages that vLLM itself makes of annotated input."""
    annotated, count = annotate_input(items, MANIFEST)
    request = ResponsesRequest.model_validate({"model": "m", "input": annotated})
    messages = construct_input_messages(request_input=request.input)
    turns = [dict(message) for message in messages if message["role"] == "assistant"]
    assert len(turns) == count
    for turn in turns:
        assert isinstance(turn["content"], str)
        assert turn["content"].count("[re") == 1
        assert turn["content"].startswith("[re")
    return turns


def contents(*items: Any) -> list[str]:
    return [turn["content"] for turn in chat_of(list(items))]


@pytest.mark.parametrize(
    ("item", "content"),
    [
        (said("Yes."), f"{ANSWER}Yes."),
        (said("Yes.", id="msg_1", status="completed"), f"{ANSWER}Yes."),
        (said("Yes.", id=None, status=None, phase=None), f"{ANSWER}Yes."),
        ({"role": "assistant", "content": "Yes."}, f"{ANSWER}Yes."),
        ({"type": "message", "role": "assistant", "content": "Yes."}, f"{ANSWER}Yes."),
        ({"role": "assistant", "content": None}, ANSWER),
        ({"role": "assistant", "content": []}, ANSWER),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}]}, f"{ANSWER}a"),
        (said("a", "b"), f"{ANSWER}a\nb"),
        (refused("No."), f"{SAFETY}No."),
        (refused("No.", refusal_category="humanizing"), f"{HUMANIZING}No."),
        (refused("", refusal_category="humanizing"), HUMANIZING),
        (said("No.", refusal_category="humanizing"), f"{HUMANIZING}No."),
        (said("No.", refusal_category=None), f"{ANSWER}No."),
        ({"role": "assistant", "content": "No.", "refusal_category": "safety"}, f"{SAFETY}No."),
    ],
)
def test_message_opens_with_its_token(item: dict[str, Any], content: str) -> None:
    before = copy.deepcopy(item)
    assert contents(USER, item, USER) == [content]
    assert item == before, "the client's item was changed"


def test_items_that_vllm_makes_one_turn_of_have_one_token() -> None:
    (turn,) = chat_of([USER, reasoned("Hm."), said("a"), call("f"), call("g"), result("f")])
    assert turn["content"] == f"{ANSWER}a"
    assert turn["reasoning"] == "Hm."
    assert [one["function"]["name"] for one in turn["tool_calls"]] == ["f", "g"]


def test_call_before_its_message_is_the_same_turn() -> None:
    (turn,) = chat_of([USER, call("f"), said("a"), result("f")])
    assert turn["content"] == f"{ANSWER}a"
    assert len(turn["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([call("f"), result("f")], [ANSWER]),
        ([reasoned("Hm."), call("f"), result("f")], [ANSWER]),
        ([said("a"), said("b")], [f"{ANSWER}a", f"{ANSWER}b"]),
        ([call("f"), result("f"), said("b"), USER, refused("No.")], 
         [ANSWER, f"{ANSWER}b", f"{SAFETY}No."]),
        ([said("a"), reasoned("x"), reasoned("y"), call("f")], [f"{ANSWER}a", ANSWER]),
        ([reasoned("x"), reasoned("y"), said("b")], [ANSWER, f"{ANSWER}b"]),
        ([said("a"), call("f"), said("b"), call("g")], [f"{ANSWER}a", f"{ANSWER}b"]),
        ([call("f"), call("g"), reasoned("x"), said("b")], [f"{ANSWER}b"]),
        ([{"type": "custom_tool_call", "call_id": "1", "name": "f", "input": "x"}], [ANSWER]),
    ],
)  # fmt: skip
def test_every_turn_that_vllm_makes_opens_with_one_token(
    items: list[Any], expected: list[str]
) -> None:
    assert contents(USER, *items) == expected


def test_other_items_pass_and_are_not_counted() -> None:
    items: list[Any] = [
        USER,
        {"type": "message", "role": "system", "content": "s"},
        result("f"),
        "no item",
        None,
        {"type": 5, "role": "assistant"},
    ]
    annotated, count = annotate_input(items, MANIFEST)
    assert (annotated, count) == (items, 0)


@pytest.mark.parametrize("status", ["in_progress", "incomplete"])
def test_unfinished_last_message_goes_on(status: str) -> None:
    annotated, _ = annotate_input([USER, said("The capital", status=status)], MANIFEST)
    assert goes_on(annotated)
    request = ResponsesRequest.model_validate({"model": "m", "input": annotated})
    params = request.build_chat_params(None, "auto")
    assert params.chat_template_kwargs["continue_final_message"] is True


@pytest.mark.parametrize(
    "items",
    [
        [],
        [USER],
        [said("a")],
        [said("a", status="completed")],
        [said("a", status="incomplete"), USER],
        [{"role": "assistant", "content": "a", "status": "incomplete"}],
        [call("f") | {"status": "incomplete"}],
        [said("a", status=["incomplete"])],
    ],
)
def test_finished_last_item_does_not_go_on(items: list[Any]) -> None:
    annotated, _ = annotate_input(items, MANIFEST)
    assert not goes_on(annotated)


def test_vllm_and_we_agree_on_an_unfinished_thought() -> None:
    annotated, count = annotate_input([USER, reasoned("Hm.", status="incomplete")], MANIFEST)
    assert count == 1
    assert goes_on(annotated)
    request = ResponsesRequest.model_validate({"model": "m", "input": annotated})
    params = request.build_chat_params(None, "auto")
    assert params.chat_template_kwargs["continue_final_message"] is True


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (refused("No.", refusal_category="x"), "input.1.refusal_category"),
        ({"role": "assistant", "content": 5}, "input.1.content"),
        ({"role": "assistant", "content": ["a"]}, "input.1.content.0"),
        (
            {"role": "assistant", "content": [{"type": "input_image", "image_url": "x"}]},
            "input.1.content.0",
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": 5}]},
            "input.1.content.0",
        ),
    ],
)
def test_what_is_wrong_names_its_path(item: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        annotate_input([USER, item], MANIFEST)
    assert caught.value.param == param


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
    context = context_of(REFUSED)
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
    context = context_of(REFUSED)
    context.refusal_texts[0, 0] = TEXT
    shape = shape_of(context)
    ends = [*recorded[:2], recorded[-1] | {"sequence_number": 2}]
    events = [one for event in ends for one in shape.event(event)]
    assert kinds(events) == [*OPENED, "refusal.delta", *CLOSED]
    assert [event["sequence_number"] for event in events] == list(range(9))


def test_report_stands_on_the_response_of_the_last_event() -> None:
    for decision in (Decision(None, (-1.0, -2.0)), Decision(0, (1.0, -2.0))):
        shape = shape_of(context_of(decision, report=True))
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
    context = context_of(Decision(1))
    context.refusal_texts[0, 0] = TEXT
    shape_of(context).answer(answer)
    assert Response.model_validate(answer).output_text == ""
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
