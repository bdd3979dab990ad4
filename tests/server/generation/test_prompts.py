from dataclasses import dataclass
from typing import Any

import pytest

from models.errors import RequestError
from server.generation.prompts import (
    check_length,
    decision_step,
    token_prompt,
    with_ids,
    without_tokens,
)
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = 10, 11, 12
OPENING = [3, 4]


@pytest.mark.parametrize(
    "prompt",
    [
        "text",
        None,
        {"prompt_token_ids": [1]},
        {"type": "embeds", "prompt_token_ids": [1]},
        {"type": "enc_dec"},
    ],
)
def test_prompts_whose_ids_are_not_known_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError, match="token prompts only") as caught:
        token_prompt(prompt)
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["token", "multimodal"])
def test_ids_are_changed_in_a_copy(kind: str) -> None:
    prompt: Any = {
        "type": kind,
        "prompt_token_ids": [1],
        "prompt_token_offsets": [0],
        "cache_salt": "x",
    }
    assert token_prompt(prompt) is prompt
    assert with_ids(prompt, [2, 3]) == {
        "type": kind,
        "prompt_token_ids": [2, 3],
        "cache_salt": "x",
    }
    assert prompt["prompt_token_ids"] == [1]


def test_two_places_are_kept_for_the_decision_and_the_answer() -> None:
    check_length([0] * 8, 10)
    with pytest.raises(RequestError, match="has 9 tokens and may have 8"):
        check_length([0] * 9, 10)


def step(ids: list[int], written: int, *, opens: bool = True, continues: bool = False) -> int:
    return decision_step(
        ids,
        OPENING,
        frozenset(MANIFEST.control_ids),
        written=written,
        opens_turn=opens,
        continues=continues,
    )


ANSWERED = [1, *OPENING, RESPOND, 5]
REFUSED = [*OPENING, SAFETY, 6]


@pytest.mark.parametrize(
    ("ids", "written", "decided"),
    [
        ([1, 2, *OPENING], 0, 4),
        ([*ANSWERED, *OPENING], 1, 7),
        ([*ANSWERED, *REFUSED, *OPENING], 2, 11),
    ],
)
def test_conversation_is_decided_where_it_ends(ids: list[int], written: int, decided: int) -> None:
    assert step(ids, written) == decided == len(ids)


@pytest.mark.parametrize(
    ("ids", "written", "decided"),
    [
        (ANSWERED, 1, ANSWERED[:3]),
        ([*ANSWERED, *OPENING, RESPOND, 7, 8], 2, [*ANSWERED, *OPENING]),
        # Nothing of the turn is written yet.
        ([1, *OPENING, RESPOND], 1, [1, *OPENING]),
    ],
)
def test_continued_turn_is_decided_before_its_own_control_token(
    ids: list[int], written: int, decided: list[int]
) -> None:
    assert ids[: step(ids, written, continues=True)] == decided


@pytest.mark.parametrize("opens", [False, True])
def test_raw_prompt_may_end_anywhere(opens: bool) -> None:
    assert step([1, 2, *OPENING], 0, opens=opens) == 4
    assert step([1, 2], 0, opens=False) == 2


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize(
    ("ids", "written", "message"),
    [
        ([*ANSWERED, *REFUSED], 1, "is one of this model's control tokens"),
        ([1, *OPENING, RESPOND], 0, "is one of this model's control tokens"),
        ([1, RESPOND, *OPENING], 1, "is one of this model's control tokens"),
        ([RESPOND, *OPENING], 1, "is one of this model's control tokens"),
        ([4, HUMANIZING, *OPENING], 1, "is one of this model's control tokens"),
        # Dropped, or cut off: the last turn's, the first one's, and both.
        ([*ANSWERED, *OPENING], 2, "holds 1 of the conversation's 2 assistant turns"),
        ([*ANSWERED, *OPENING, 7], 2, "holds 1 of the conversation's 2 assistant turns"),
        ([*REFUSED, *OPENING], 2, "holds 1 of the conversation's 2 assistant turns"),
        ([1, *OPENING], 2, "holds 0 of the conversation's 2 assistant turns"),
        ([1], 1, "holds 0 of the conversation's 1 assistant turns"),
    ],
)
def test_prompt_with_other_control_tokens_than_the_server_wrote_is_rejected(
    ids: list[int], written: int, message: str, opens: bool, continues: bool
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        step(ids, written, opens=opens, continues=continues)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("ids", "written", "continues"),
    [
        ([1, *OPENING, 2], 0, False),
        ([1], 0, False),
        (ANSWERED, 1, False),
        # A turn was opened although the last one was to be continued.
        ([*ANSWERED, *OPENING], 1, True),
    ],
)
def test_conversation_that_ends_elsewhere_is_rejected(
    ids: list[int], written: int, continues: bool
) -> None:
    with pytest.raises(RequestError, match="does not end where") as caught:
        step(ids, written, continues=continues)
    assert caught.value.status == 400


def test_prompt_without_the_mark_is_the_same_object() -> None:
    prompt: Any = {"type": "token", "prompt_token_ids": [1, 2]}
    assert without_tokens(prompt, (9,)) is prompt


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


def test_marks_are_taken_out_and_images_move_with_the_text() -> None:
    prompt: Any = {
        "type": "multimodal",
        "prompt_token_ids": [9, 1, 9, 5, 5, 2, 9, 6],
        "mm_placeholders": {"image": [Place(3, 2), Place(7, 1)]},
    }
    kept: Any = without_tokens(prompt, (9,))
    assert kept["prompt_token_ids"] == [1, 5, 5, 2, 6]
    assert kept["mm_placeholders"] == {"image": [Place(1, 2), Place(4, 1)]}
    assert prompt["prompt_token_ids"] == [9, 1, 9, 5, 5, 2, 9, 6]
