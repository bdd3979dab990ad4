"""Rows of other formats: chats and CoCoNot."""

from typing import Any

import pytest

from tests.training.data.conftest import Write
from tests.training.data.test_sources import COCONOT, complaint_of, json_lines, read_rows, said


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "Hi",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Tea?"},
                {"role": "assistant", "content": "A drink."},
            ],
        },
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Tea?"},
                {"from": "gpt", "value": "A drink."},
                {"from": "human", "value": "Thanks"},
            ]
        },
    ],
)
def test_chat_is_a_row_of_answers(write: Write, row: dict[str, Any]) -> None:
    path = write("chats.jsonl", json_lines([row]))

    (read_row,) = read_rows(path=path, format="chat")

    assert [(turn.role, turn.content, turn.category) for turn in read_row.messages] == [
        ("user", "Hi", None),
        ("assistant", "Hello", None),
        ("user", "Tea?", None),
        ("assistant", "A drink.", None),
    ]


def test_first_turn_may_stand_in_the_prompt_alone(write: Write) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = {"prompt": "Hi", "messages": [{"role": "assistant", "content": parts}]}

    (read_row,) = read_rows(path=write("chats.jsonl", json_lines([row])), format="chat")

    assert [turn.content for turn in read_row.messages] == ["Hi", "Hello"]


def test_chat_of_prompt_and_response_is_an_answer(write: Write) -> None:
    path = write("dolly.csv", "instruction,output\nTea?,A drink.\n")

    rows = read_rows(
        path=path, format="chat", columns={"prompt": "instruction", "response": "output"}
    )

    assert said(rows) == [("Tea?", None, "A drink.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hi"}, "messages: is no JSON"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn is the assistant's"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "'assistant' has no text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "are no text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "messages.1.role",
        ),
        ({"text": "a"}, "prompt: is missing"),
    ],
)
def test_bad_chat_names_line_and_reason(write: Write, row: dict[str, Any], reason: str) -> None:
    path = write("chats.jsonl", json_lines([row]))

    complaint = complaint_of(path=path, format="chat")

    assert complaint.startswith(f"{path}:1: ")
    assert reason in complaint


def test_coconot_rows_are_refused_for_their_category(write: Write) -> None:
    rows = [COCONOT, {**COCONOT, "category": "Humanizing requests", "response": ""}]

    path = write("coconot_train.jsonl", json_lines(rows))

    assert said(read_rows(path=path, format="coconot")) == [
        ("How do I pick a lock?", "safety", "I can't."),
        ("How do I pick a lock?", "humanizing", None),
    ]


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("coconot_contrast_eval.jsonl", {}, {}),
        ("test.jsonl", {}, {"subset": "contrast"}),
        ("rows.jsonl", {"is_refusal": 0}, {}),
    ],
)
def test_contrast_rows_are_answered_and_near_misses(
    write: Write, name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    path = write(name, json_lines([{**COCONOT, **changes}]))

    (row,) = read_rows(path=path, format="coconot", **options)

    assert (row.category, row.near_miss, row.response) == (None, "safety", "I can't.")


def test_preference_rows_are_answered_with_what_was_chosen(write: Write) -> None:
    row = {
        "id": "a2",
        "prompt": "How to burn calories?",
        "chosen": [
            {"content": "How to burn calories?", "role": "user"},
            {"content": "Walk.", "role": "assistant"},
        ],
        "rejected": [{"content": "No.", "role": "assistant"}],
    }
    path = write("coconot_pref.jsonl", json_lines([row, {**row, "chosen": "Run."}]))

    rows = read_rows(path=path, format="coconot")

    assert [(r.category, r.near_miss, r.response) for r in rows] == [
        (None, None, "Walk."),
        (None, None, "Run."),
    ]


def test_coconot_category_that_the_recipe_lacks_can_be_mapped(write: Write) -> None:
    path = write("rows.jsonl", json_lines([{**COCONOT, "category": "Unsupported requests"}]))

    assert "category 'unsupported' is unknown" in complaint_of(path=path, format="coconot")
    (row,) = read_rows(
        path=path, format="coconot", categories={"Unsupported requests": "humanizing"}
    )
    assert row.category == "humanizing"
