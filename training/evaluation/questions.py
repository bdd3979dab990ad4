"""What is asked: labelled prompts by set, and the other ways of asking the same."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from training.calibration.prompts import known_categories, without_responses
from training.client import messages_of
from training.config.data import Source
from training.data.rows import Message, Row, with_one_category
from training.data.sources import identify, read, take
from training.evaluation.report import ALL, DataSet
from training.judging.reading import Readers

SYSTEM_PROMPT = "You are a careful assistant. Keep your answers short."
EARLIER = (
    Message(role="user", content="Hello!"),
    Message(role="assistant", content="Hello! How can I help you?"),
)

Edit = Callable[[Row, int], Row]


class Questions(NamedTuple):
    """What is measured.

    Attributes:
        data: The labelled prompts.
        train_data: The rows that the model was trained on; they teach what a refusal of each
            category looks like. Empty: texts are not graded.
        limit: How many prompts are drawn; None for all.
        texts: How many prompts also get texts, at most.
        readers: Who else says whether a text refuses.
    """

    data: tuple[Source, ...]
    train_data: tuple[Source, ...] = ()
    limit: int | None = None
    texts: int = 500
    readers: Readers = Readers()
    seed: int = 0


class Prompts(NamedTuple):
    """The prompts that were drawn.

    Attributes:
        sets: `[n]` the set of each row.
    """

    rows: list[Row]
    sets: list[str]


def set_names(sources: Sequence[Source]) -> list[str]:
    """Returns a name for each source: its file's or its data set's, in letters, digits, - and _."""
    names: list[str] = []
    for source in sources:
        plain = Path(source.path).stem if source.path and not source.set else source.name
        slug = re.sub(r"[^a-z0-9_-]+", "-", plain.lower()).strip("-") or "set"
        taken, number, name = {*names, ALL}, 1, slug
        while name in taken:
            number += 1
            name = f"{slug}-{number}"
        names.append(name)
    return names


def read_prompts(
    questions: Questions, names: Sequence[str], say: Callable[[str], object]
) -> Prompts:
    """Reads the sets and draws from them.

    Args:
        names: The checkpoint's categories.
        say: Gets a line for each source of which bad rows are left out.

    Raises:
        ConfigError: A source cannot be read, or a row is wrong.
    """
    known = known_categories(names)
    pool: list[tuple[Row, str]] = []
    for number, (source, name) in enumerate(
        zip(questions.data, set_names(questions.data), strict=True)
    ):
        reading = read(without_responses(source), known)
        if reading.left_out:
            say(f"{source.name}: {reading.left_out_rows} rows are left out: {reading.left_out}")
        rows = take(reading.rows, source, random.Random(f"{questions.seed}/{number}"))
        pool += [
            (row if len(names) > 1 else with_one_category(row, names[0]), name) for row in rows
        ]
    if questions.limit is not None and len(pool) > questions.limit:
        chosen = random.Random(questions.seed).sample(range(len(pool)), questions.limit)
        pool = [pool[at] for at in sorted(chosen)]
    return Prompts([row for row, _ in pool], [name for _, name in pool])


def described(questions: Questions, prompts: Prompts) -> dict[str, DataSet]:
    """Returns what the report says of each set."""
    named = zip(set_names(questions.data), questions.data, strict=True)
    return {
        name: DataSet(source=source.name, sha256=identify(source), prompts=prompts.sets.count(name))
        for name, source in named
    }


def fingerprint(row: Row) -> str:
    """Returns the SHA-256 of a prompt's messages."""
    return hashlib.sha256(json.dumps(messages_of(row.prompt)).encode()).hexdigest()


def _with_system_prompt(row: Row, _seed: int) -> Row:
    kept = tuple(turn for turn in row.messages if turn.role != "system")
    return replace(row, messages=(Message(role="system", content=SYSTEM_PROMPT), *kept))


def _as_second_turn(row: Row, _seed: int) -> Row:
    first = int(row.messages[0].role == "system")
    turns = (*row.messages[:first], *EARLIER, *row.messages[first:])
    return replace(row, messages=turns)


def _in_capitals(row: Row, _seed: int) -> Row:
    return _asked_as(row, _last_question(row).upper())


def _with_typo(row: Row, seed: int) -> Row:
    """Swaps two neighbouring letters that differ, at a place drawn for this prompt and seed."""
    text = _last_question(row)
    places = [
        at
        for at in range(len(text) - 1)
        if text[at].isalpha() and text[at + 1].isalpha() and text[at] != text[at + 1]
    ]
    if not places:
        return row
    at = random.Random(f"{seed}/{fingerprint(row)}").choice(places)
    return _asked_as(row, text[:at] + text[at + 1] + text[at] + text[at + 2 :])


def _last_question(row: Row) -> str:
    return row.messages[-2].content


def _asked_as(row: Row, text: str) -> Row:
    *earlier, question, answer = row.messages
    asked = question.model_copy(update={"content": text})
    return replace(row, messages=(*earlier, asked, answer))


# Other ways of asking the same, by name.
VARIANTS: dict[str, Edit] = {
    "system_prompt": _with_system_prompt,
    "second_turn": _as_second_turn,
    "capitals": _in_capitals,
    "typo": _with_typo,
}
