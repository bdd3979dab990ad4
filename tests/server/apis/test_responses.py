import copy
from typing import Any

import pytest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from models.errors import RequestError
from server.apis.responses import annotate_input, goes_on
from tests.server.manifests import MANIFEST

ANSWER = "[respond]"
SAFETY = "[refuse:safety]"
HUMANIZING = "[refuse:humanizing]"
USER = {"role": "user", "content": "u"}


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
