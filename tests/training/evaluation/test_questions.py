import json
from pathlib import Path

import pytest

from models.errors import ConfigError
from training.config.data import Source
from training.data.rows import Message, Row
from training.evaluation.questions import (
    EARLIER,
    SYSTEM_PROMPT,
    VARIANTS,
    Questions,
    fingerprint,
    read_prompts,
    set_names,
)

NAMES = ("safety", "humanizing")


def row(*turns: tuple[str, str]) -> Row:
    messages = [Message.model_validate({"role": role, "content": text}) for role, text in turns]
    return Row((*messages, Message(role="assistant", content="")), None, None, "f:1")


CHAT = row(
    ("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Why 2 of aab?")
)


def test_sets_are_called_after_their_sources() -> None:
    sources = [
        Source(path="data/My prompts.v2.jsonl"),
        Source(path="all.csv"),
        Source(path="other/all.csv"),
        Source(hub="allenai/coconot", subset="contrast", split="test"),
        Source(path="日本.jsonl"),
        Source.model_validate({"set": "xstest", "path": "copy.csv"}),
    ]

    assert set_names(sources) == [
        "my-prompts-v2",
        "all-2",
        "all-3",
        "allenai-coconot-contrast-test",
        "set",
        "xstest",
    ]


def test_variants_change_only_what_they_say() -> None:
    asked = {name: edit(CHAT, 0).prompt for name, edit in VARIANTS.items()}
    system, *rest = CHAT.prompt

    assert asked["system_prompt"] == (Message(role="system", content=SYSTEM_PROMPT), *rest)
    assert asked["second_turn"] == (system, *EARLIER, *rest)
    assert asked["capitals"] == (*CHAT.prompt[:-1], Message(role="user", content="WHY 2 OF AAB?"))
    assert asked["typo"][:-1] == CHAT.prompt[:-1]


def test_typo_swaps_two_letters_that_differ_and_depends_on_the_seed_alone() -> None:
    edit = VARIANTS["typo"]
    texts = {edit(CHAT, seed).prompt[-1].content for seed in range(40)}

    assert texts == {"hWy 2 of aab?", "Wyh 2 of aab?", "Why 2 fo aab?", "Why 2 of aba?"}
    assert edit(CHAT, 7) == edit(CHAT, 7)
    nothing = row(("user", "1 + 1?"))
    assert edit(nothing, 0) == nothing


def test_fingerprint_is_of_the_messages_alone() -> None:
    answered = row(("user", "Hi."))
    refused = Message(role="assistant", content="x", category="safety")
    other = Row((*answered.prompt, refused), "a", "p", "f:2")

    assert fingerprint(answered) == fingerprint(other)
    assert fingerprint(answered) != fingerprint(row(("user", "Hi!")))


def test_prompts_need_no_responses(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "category": None}) + "\n")

    prompts = read_prompts(Questions((Source(path=str(path)),)), NAMES, print)

    assert (len(prompts.rows), prompts.sets) == (1, ["p"])


def test_checkpoint_of_one_category_takes_every_refusal_as_its_own(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "category": "weapons"}) + "\n")
    questions = Questions((Source(path=str(path)),))

    assert read_prompts(questions, ["refusal"], print).rows[0].category == "refusal"
    with pytest.raises(ConfigError, match="'weapons' is unknown"):
        read_prompts(questions, NAMES, print)
