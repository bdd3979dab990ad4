from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import RequestError
from server.hiding import Hider
from server.prompts import (
    before_last_turn,
    check_control_tokens,
    check_length,
    check_opening,
    check_params,
    prompt_ids,
    with_ids,
    without_id,
)
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = 10, 11, 12
OPENING = [3, 4]
FIELDS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids")


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
        prompt_ids(prompt)
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["token", "multimodal"])
def test_ids_are_changed_in_a_copy(kind: str) -> None:
    prompt = {"type": kind, "prompt_token_ids": [1], "prompt_token_offsets": [0], "cache_salt": "x"}
    assert prompt_ids(prompt) == [1]
    assert with_ids(prompt, [2, 3]) == {
        "type": kind,
        "prompt_token_ids": [2, 3],
        "cache_salt": "x",
    }
    assert prompt["prompt_token_ids"] == [1]


@pytest.mark.parametrize("field", FIELDS)
def test_parameters_on_control_tokens_are_refused(field: str) -> None:
    value: Any = {7: 1.0} if field == "logit_bias" else [7]
    params = SimpleNamespace(**{**dict.fromkeys(FIELDS), field: value})
    check_params(params, frozenset({8}))
    with pytest.raises(RequestError, match=field) as caught:
        check_params(params, frozenset({7}))
    assert (caught.value.param, caught.value.status) == (field, 400)


def test_two_places_are_kept_for_the_decision_and_the_answer() -> None:
    check_length([0] * 8, 10)
    with pytest.raises(RequestError, match="has 9 tokens and may have 8"):
        check_length([0] * 9, 10)


@pytest.mark.parametrize(
    ("ids", "allowed", "passes"),
    [
        ([1, 2, 3, 4], 0, True),
        ([1, *OPENING, RESPOND, 5, *OPENING], 1, True),
        ([1, *OPENING, RESPOND, 5, *OPENING, SAFETY, 6], 2, True),
        ([1, *OPENING, RESPOND, 5, *OPENING, SAFETY, 6], 1, False),
        ([1, *OPENING, RESPOND], 0, False),
        ([1, RESPOND, 5], 1, False),
        ([RESPOND], 1, False),
        ([4, HUMANIZING], 1, False),
    ],
)
def test_control_tokens_stand_where_the_server_puts_them(
    ids: list[int], allowed: int, passes: bool
) -> None:
    hider = Hider(MANIFEST, "mark")
    if passes:
        check_control_tokens(ids, OPENING, allowed, hider)
        return
    with pytest.raises(RequestError, match="control tokens") as caught:
        check_control_tokens(ids, OPENING, allowed, hider)
    assert caught.value.status == 400


def test_continued_turn_is_cut_at_its_own_control_token() -> None:
    assert before_last_turn([1, RESPOND, 2, RESPOND, 5, 6], MANIFEST) == [1, RESPOND, 2]
    with pytest.raises(RequestError, match="continue_final_message"):
        before_last_turn([1, 2], MANIFEST)


def test_prompt_without_the_mark_is_the_same_object() -> None:
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    assert without_id(prompt, 9) is prompt
    assert without_id("text", 9) == "text"


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


def test_marks_are_taken_out_and_images_move_with_the_text() -> None:
    prompt = {
        "type": "multimodal",
        "prompt_token_ids": [9, 1, 9, 5, 5, 2, 9, 6],
        "mm_placeholders": {"image": [Place(3, 2), Place(7, 1)]},
    }
    kept = without_id(prompt, 9)
    assert kept["prompt_token_ids"] == [1, 5, 5, 2, 6]
    assert kept["mm_placeholders"] == {"image": [Place(1, 2), Place(4, 1)]}
    assert prompt["prompt_token_ids"] == [9, 1, 9, 5, 5, 2, 9, 6]


@pytest.mark.parametrize(("ids", "passes"), [([1, *OPENING], True), ([1, *OPENING, 2], False)])
def test_conversation_ends_with_the_opening(ids: list[int], passes: bool) -> None:
    if passes:
        check_opening(ids, OPENING)
        return
    with pytest.raises(RequestError, match="does not end where") as caught:
        check_opening(ids, OPENING)
    assert caught.value.status == 400
