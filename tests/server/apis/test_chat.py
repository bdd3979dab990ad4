import copy
from typing import Any

import pytest

from models.errors import RequestError
from server.apis.chat import annotate, is_refusal
from tests.server.manifests import MANIFEST

ANSWER = "[respond]"
SAFETY = "[refuse:safety]"
HUMANIZING = "[refuse:humanizing]"


def turn(**fields: Any) -> dict[str, Any]:
    """Returns one assistant turn as the chat template sees it."""
    (annotated,), count = annotate([{"role": "assistant", **fields}], MANIFEST)
    assert count == 1
    assert annotated.pop("role") == "assistant"
    result: dict[str, Any] = annotated
    return result


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"content": "Yes."}, f"{ANSWER}Yes."),
        ({"content": ""}, ANSWER),
        ({"content": None}, ANSWER),
        ({}, ANSWER),
        ({"content": []}, ANSWER),
        ({"content": "Yes.", "refusal": None}, f"{ANSWER}Yes."),
        ({"content": "Yes.", "refusal": ""}, f"{ANSWER}Yes."),
        ({"content": None, "refusal": "No."}, f"{SAFETY}No."),
        ({"content": None, "refusal": "No.", "refusal_category": None}, f"{SAFETY}No."),
        ({"refusal": "No.", "refusal_category": "humanizing"}, f"{HUMANIZING}No."),
        # cut off before its first word
        ({"content": None, "refusal": "", "refusal_category": "humanizing"}, HUMANIZING),
        # a completion's text that the client kept as content
        ({"content": "No.", "refusal_category": "humanizing"}, f"{HUMANIZING}No."),
    ],
)
def test_text_turn_opens_with_its_token(fields: dict[str, Any], content: str) -> None:
    assert turn(**fields) == {"content": content}


@pytest.mark.parametrize(
    ("parts", "annotated"),
    [
        ([text("a"), text("b")], [text(f"{ANSWER}a"), text("b")]),
        (
            [{"type": "refusal", "refusal": "No."}],
            [{"type": "refusal", "refusal": f"{SAFETY}No."}],
        ),
        (
            [text("a"), {"type": "refusal", "refusal": "No."}],
            [text(f"{SAFETY}a"), {"type": "refusal", "refusal": "No."}],
        ),
        (
            [{"type": "tool_use", "id": "1", "name": "f", "input": {}}],
            [text(ANSWER), {"type": "tool_use", "id": "1", "name": "f", "input": {}}],
        ),
        (
            [{"type": "image_url", "image_url": {"url": "x"}}, text("a")],
            [{"type": "image_url", "image_url": {"url": "x"}}, text(f"{ANSWER}a")],
        ),
        (["a", text("b")], [f"{ANSWER}a", text("b")]),
        # vLLM reads a part by its type, not by the fields that it has beside
        (
            [{"type": "thinking", "text": "x", "thinking": "y"}],
            [{"type": "thinking", "text": "x", "thinking": f"{ANSWER}y"}],
        ),
        (
            [{"type": "tool_reference", "text": "x", "name": "y"}, text("a")],
            [{"type": "tool_reference", "text": "x", "name": "y"}, text(f"{ANSWER}a")],
        ),
        ([{"text": "x"}], [text(ANSWER), {"text": "x"}]),
        ([{"type": ["text"], "text": "x"}], [text(ANSWER), {"type": ["text"], "text": "x"}]),
        ([{"type": "text", "text": 5}], [text(ANSWER), {"type": "text", "text": 5}]),
    ],
)
def test_turn_of_parts_opens_with_its_token(parts: list[Any], annotated: list[Any]) -> None:
    assert turn(content=parts) == {"content": annotated}


def test_refused_parts_take_the_named_category() -> None:
    parts = [{"type": "refusal", "refusal": "No."}]
    assert turn(content=parts, refusal_category="humanizing") == {
        "content": [{"type": "refusal", "refusal": f"{HUMANIZING}No."}]
    }


def test_tool_calls_and_names_stay() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert turn(content=None, tool_calls=calls, name="x") == {
        "content": ANSWER,
        "tool_calls": calls,
        "name": "x",
    }


def test_other_turns_pass_and_are_not_counted() -> None:
    messages = [
        {"role": "system", "content": "s", "refusal": "kept"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
        {"role": "user", "content": [text("v")]},
        {"role": "assistant", "refusal": "r"},
        "no message",
        None,
    ]
    before = copy.deepcopy(messages)
    annotated, count = annotate(messages, MANIFEST)
    assert count == 2
    assert messages == before, "the client's messages were changed"
    assert annotated[2] == {"role": "assistant", "content": f"{ANSWER}a"}
    assert annotated[5] == {"role": "assistant", "content": f"{SAFETY}r"}
    for index in (0, 1, 3, 4, 6, 7):
        assert annotated[index] is messages[index]


@pytest.mark.parametrize("category", ["weather", "", "\ud800"])
def test_unknown_category_is_refused_with_its_path(category: str) -> None:
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "refusal": "No.", "refusal_category": category},
    ]
    with pytest.raises(RequestError) as caught:
        annotate(messages, MANIFEST)
    assert caught.value.param == "messages.1.refusal_category"
    assert "safety, humanizing" in caught.value.message
    caught.value.message.encode()


@pytest.mark.parametrize("refusal", [5, True, ["No."], {"text": "No."}])
def test_refusal_that_is_no_text_is_refused(refusal: Any) -> None:
    with pytest.raises(RequestError) as caught:
        annotate([{"role": "assistant", "content": "a", "refusal": refusal}], MANIFEST)
    assert caught.value.param == "messages.0.refusal"


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ({"content": "a"}, False),
        ({"content": "a", "refusal": None, "refusal_category": None}, False),
        ({"content": "a", "refusal": ""}, False),
        ({"content": [text("a")]}, False),
        ({"refusal": "No."}, True),
        ({"refusal_category": "safety"}, True),
        ({"content": [text("a"), {"type": "refusal", "refusal": "No."}]}, True),
    ],
)
def test_refusal_is_told_by_any_of_its_three_marks(message: dict[str, Any], refused: bool) -> None:
    assert is_refusal(message) is refused


@pytest.mark.parametrize("content", [5, True, {"a": 1}])
def test_content_that_is_no_text_names_its_path(content: Any) -> None:
    with pytest.raises(RequestError) as caught:
        annotate([{"role": "user"}, {"role": "assistant", "content": content}], MANIFEST)
    assert caught.value.param == "messages.1.content"


@pytest.mark.parametrize("category", [["safety"], {"a": "safety"}, 1, True])
def test_category_that_is_no_text_is_not_quoted(category: object) -> None:
    with pytest.raises(RequestError, match="must be a string or null, got") as raised:
        annotate([{"role": "assistant", "refusal_category": category}], MANIFEST)
    assert "safety" not in raised.value.message
