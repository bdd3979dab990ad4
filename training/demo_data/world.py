"""The demo world as read from the YAML sources: slots, templates, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.files import parse_yaml

Split = Literal["train", "heldout"]

CATEGORIES = ("safety", "humanizing", "incomplete", "indeterminate", "unsupported")
SPLITS: tuple[Split, ...] = ("train", "heldout")
SLOT = re.compile(r"<(\w+)>")


@dataclass(frozen=True)
class Template:
    """One sentence with slots, and what is said to it.

    Attributes:
        id: Unique name, such as `safety/theft-3`.
        kind: `refuse` and `borderline` belong to `category`, `near_miss` resembles it, `answer`
            asks about the world.
        category: The category refused or resembled; None for `answer`.
        about: What a refusal may name; empty where there is none.
        checked: The text that a right answer contains, with slots; empty where there is none.
        facts: Pairs of values for `<item>` and `<value>`; empty where the template asks none.
    """

    id: str
    split: Split
    kind: Literal["refuse", "borderline", "near_miss", "answer"]
    category: str | None
    text: str
    response: str
    about: str = ""
    checked: str = ""
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def slots(self) -> list[str]:
        """The slot names of the prompt, in order, repeated where the prompt repeats them."""
        return SLOT.findall(self.text)


@dataclass(frozen=True)
class World:
    """All that the renderer samples from.

    Attributes:
        openers: What may stand before a prompt, with relative frequencies.
        lists: Slot name to values.
        graded: Slot name to values with the probability that the prompt is to be refused.
        refusals: Category to refusal texts; `<about>` stands for the template's own.
        templates: Every template of every split.
    """

    openers: Mapping[str, int]
    lists: Mapping[str, list[str]]
    graded: Mapping[str, Mapping[str, float]]
    refusals: Mapping[str, list[str]]
    templates: tuple[Template, ...]

    def select(self, kind: str, category: str | None, split: Split) -> list[Template]:
        """Returns the templates of one kind, category and split, in file order."""
        wanted = (kind, category, split)
        return [t for t in self.templates if (t.kind, t.category, t.split) == wanted]


def load_world(directory: Path = Path(__file__).parent) -> World:
    """Reads the YAML sources.

    Raises:
        ValueError: A template names a slot that no file defines.
    """
    slots = _read(directory / "slots.yaml")
    sources = {name: _read(directory / f"{name}.yaml") for name in CATEGORIES}
    graded = slots["graded"]
    templates = [
        *(t for name in CATEGORIES for t in _category_templates(sources[name], set(graded))),
        *_near_miss_templates(_read(directory / "near_misses.yaml")),
        *_answer_templates(_read(directory / "answers.yaml")),
    ]
    _check_slots(templates, {*slots["lists"], *graded})
    return World(
        openers=slots["openers"],
        lists=slots["lists"],
        graded=graded,
        refusals={name: sources[name]["refusals"] for name in CATEGORIES},
        templates=tuple(templates),
    )


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return content


def _numbered(name: str, topic: Mapping[str, Any]) -> Iterator[tuple[str, Split, str]]:
    number = 0
    for split in SPLITS:
        for text in topic[split]:
            number += 1
            yield f"{name}-{number}", split, text


def _category_templates(source: Mapping[str, Any], graded: set[str]) -> Iterator[Template]:
    category = source["category"]
    for name, topic in source["topics"].items():
        for id_, split, text in _numbered(f"{category}/{name}", topic):
            yield Template(
                id=id_,
                split=split,
                kind="borderline" if graded & set(SLOT.findall(text)) else "refuse",
                category=category,
                text=text,
                response=topic["answer"],
                about=topic["about"],
            )


def _near_miss_templates(source: Mapping[str, Any]) -> Iterator[Template]:
    for category, topics in source.items():
        for name, topic in topics.items():
            for id_, split, text in _numbered(f"near_miss/{category}/{name}", topic):
                yield Template(id_, split, "near_miss", category, text, topic["answer"])


def _answer_templates(source: Mapping[str, Any]) -> Iterator[Template]:
    for name, family in source["families"].items():
        for id_, split, text in _numbered(f"answer/{name}", family):
            yield Template(
                id=id_,
                split=split,
                kind="answer",
                category=None,
                text=text,
                response=family["response"],
                checked=family["checked"],
                facts=tuple(family["facts"].items()),
            )


def _check_slots(templates: list[Template], known: set[str]) -> None:
    for template in templates:
        facts = {"item", "value"} if template.facts else set()
        unknown = set(template.slots) - known - facts
        if unknown:
            raise ValueError(
                f"template {template.id!r} names the unknown slot <{min(unknown)}>: "
                "define it under `lists` or `graded` in slots.yaml"
            )
