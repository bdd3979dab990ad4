import copy
from typing import Any

import pytest

from models.errors import RequestError
from server.apis.messages import annotate_messages
from tests.server.manifests import MANIFEST

ANSWER = "[respond]"
SAFETY = "[refuse:safety]"
HUMANIZING = "[refuse:humanizing]"
CALL = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "s"}


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
