"""What the abilities' benchmark counts, on models of no ability."""

import pytest
import torch

from benchmarks.abilities.__main__ import (
    Speaker,
    changed_decisions,
    is_right,
    last_number,
    right_answers,
    text_losses,
)
from models.checkpoint import load_checkpoint
from models.manifest import Manifest
from tests.toy import save_toy
from training.data.rows import Message, Row
from training.evaluation.questions import VARIANTS
from training.model.start import load_model


def _row(prompt: str, response: str) -> Row:
    turns = (
        Message(role="user", content=prompt),
        Message(role="assistant", content=response, category=None),
    )
    return Row(turns, None, None, "test")


ROWS = [_row("What is tea?", "A drink."), _row("Who wrote Emma?", "Jane Austen")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Speaker, Manifest]:
    folder = tmp_path_factory.mktemp("toy")
    save_toy(folder)
    manifest, tokenizer = load_checkpoint(folder)
    return Speaker(load_model(folder, "float32").eval(), tokenizer, ""), manifest


def test_a_model_keeps_all_of_its_own_abilities(toy: tuple[Speaker, Manifest]) -> None:
    speaker, _ = toy

    losses = dict(text_losses(speaker, speaker, ROWS))

    assert all(before == after for before, after in losses.values())
    assert losses["the base's likeliest"][0] < losses["drawn from the base"][0]
    assert losses["the base's likeliest"][0] < losses["the rows'"][0]


def test_an_opening_changes_answers(toy: tuple[Speaker, Manifest]) -> None:
    speaker, manifest = toy

    losses = dict(text_losses(speaker, speaker._replace(opening=manifest.respond.token), ROWS))

    assert losses["the rows'"][0] != losses["the rows'"][1]


def test_loss_is_that_of_the_answers_tokens(toy: tuple[Speaker, Manifest]) -> None:
    speaker, _ = toy
    prompt, answer = speaker.prompt(ROWS[0]), [5, 9, 2]
    labels = torch.tensor([[-100] * len(prompt) + answer])

    wanted = speaker.model(torch.tensor([prompt + answer]), labels=labels).loss

    assert speaker.loss(ROWS[:1], [answer]) == pytest.approx(wanted.item(), rel=1e-5)


def test_right_answers_hold_the_response(toy: tuple[Speaker, Manifest]) -> None:
    assert is_right("It is PARIS, of course.", "Paris.")
    assert not is_right("It is Rome.", "Paris.")
    assert is_right("So 3 * 4 = 12", "Three times 4\nis 12.")
    assert not is_right("12 or 13", "Three times 4\nis 12.")
    assert last_number("1,200.50 or none") == "1200.50"
    assert last_number("none") is None
    assert list(right_answers(toy[0], toy[0], ROWS)) == [("right of 2 questions", [0.0, 0.0])]


def test_every_form_is_compared_with_the_prompt_as_it_is(toy: tuple[Speaker, Manifest]) -> None:
    changed = dict(changed_decisions(*toy, ROWS))

    assert [name.partition(": ")[2] for name in changed] == list(VARIANTS)
    assert all(0 <= share <= 1 for (share,) in changed.values())
