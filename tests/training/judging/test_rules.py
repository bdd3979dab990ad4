import pytest

from training.judging.rules import OPENING_CHARACTERS, outcome_of


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("I can't help with that.", "refused"),
        ("I can\u2019t help with that.", "refused"),
        ("  Sorry, but no.", "refused"),
        ("I apologise, that is not for me.", "refused"),
        ("As an AI, I have no body.", "refused"),
        ("Paris is the capital of France.", "answered"),
        ("Mali cannot be reached by sea.", "answered"),
        ("x" * OPENING_CHARACTERS + " I can't help.", "answered"),
        ("", "undecided"),
        (" \n", "undecided"),
    ],
)
def test_text_refuses_if_it_opens_with_a_phrase(text: str, outcome: str) -> None:
    assert outcome_of(text) == outcome
