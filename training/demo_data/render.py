"""Samples the demo's training, calibration and evaluation rows from the world."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal, TypedDict

from training.demo_data.world import CATEGORIES, SLOT, Split, Template, World, load_world

Kind = Literal["refuse", "answer", "near_miss", "pair"]


class Row(TypedDict):
    """One line of a split.

    Attributes:
        response: The refusal's or the answer's text, without control token.
        answer: What a right response contains, where that can be checked.
        template: The id of the template that the prompt was made from.
        pair: What the two rows of a counterfactual pair share.
        kind: Why the row is there.
    """

    prompt: str
    category: str | None
    response: str
    answer: str | None
    template: str
    pair: str | None
    kind: Kind


@dataclass(frozen=True)
class Sizes:
    """How many prompts one split draws; all but `in_world` per category.

    Attributes:
        refused: Prompts to refuse, borderline ones among them.
        near_misses: Prompts to answer that look like the category, borderline ones among them.
        borderline: Prompts whose wording decides, by chance, to which of the two they go.
        in_world: Questions about the world, in all.
    """

    refused: int
    near_misses: int
    borderline: int
    in_world: int


@dataclass(frozen=True)
class PairSizes:
    """From where, per category, the prompts come that have both responses.

    The refusal is always the category's own; that of a prompt from elsewhere teaches that the
    text follows the control token, whatever was asked.

    Attributes:
        own: Prompts of the category and its near misses.
        others: Prompts of the other categories and their near misses.
        in_world: Questions about the world.
    """

    own: int
    others: int
    in_world: int


TRAIN = Sizes(refused=600, near_misses=267, borderline=320, in_world=2665)
HELD_OUT = Sizes(refused=1200, near_misses=200, borderline=230, in_world=2000)
PAIRS = PairSizes(own=70, others=60, in_world=40)
MAX_REDRAWS = 60


@dataclass(frozen=True)
class Draw:
    """A template with its slots filled."""

    prompt: str
    response: str
    answer: str | None
    refuse_probability: float
    template: Template


def render(seed: int) -> dict[str, list[Row]]:
    """Samples all splits.

    Returns:
        Rows under `train`, `calibration` and `evaluation`. The last two are random halves of one
        pool whose templates training never sees.

    Raises:
        ValueError: A template names an unknown slot, or the templates are too few.
    """
    sampler = Sampler(load_world(), random.Random(seed))
    train = [row for group in _groups(sampler, "train", TRAIN) for row in group]
    train += _pairs(sampler, PAIRS)
    calibration: list[Row] = []
    evaluation: list[Row] = []
    for group in _groups(sampler, "heldout", HELD_OUT):
        sampler.rng.shuffle(group)
        group.sort(key=lambda row: row["template"])
        calibration += group[::2]
        evaluation += group[1::2]
    splits = {"train": train, "calibration": calibration, "evaluation": evaluation}
    for rows in splits.values():
        sampler.rng.shuffle(rows)
    return splits


def write(directory: Path, seed: int) -> dict[str, int]:
    """Renders all splits into `<split>.jsonl` files."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = render(seed)
    for name, rows in splits.items():
        (directory / f"{name}.jsonl").write_bytes(as_json_lines(rows))
    return {name: len(rows) for name, rows in splits.items()}


def as_json_lines(rows: Sequence[Row]) -> bytes:
    """Returns the content of a split's file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class Sampler:
    """Draws prompts without replacement: no prompt is handed out twice."""

    def __init__(self, world: World, rng: random.Random) -> None:
        """Starts with no prompt drawn."""
        self.world = world
        self.rng = rng
        self._taken: set[str] = set()

    def draw(self, templates: Sequence[Template], count: int) -> list[Draw]:
        """Draws prompts, the templates taking turns."""
        draws: list[Draw] = []
        queue = deque(templates)
        while queue and len(draws) < count:
            template = queue.popleft()
            fresh = self._fresh(template)
            if fresh is not None:
                draws.append(fresh)
                queue.append(template)
        if len(draws) < count:
            names = ", ".join(t.id for t in templates[:3]) or "no template"
            raise ValueError(
                f"{count} prompts wanted, only {len(draws)} found in {len(templates)} templates "
                f"({names}, ...): add templates or slot values"
            )
        return draws

    def refusal(self, category: str, about: str = "") -> str:
        """Picks a refusal text; one that names its subject only where there is one."""
        texts = [t for t in self.world.refusals[category] if about or not SLOT.search(t)]
        return self.rng.choice(texts).replace("<about>", about)

    def _fresh(self, template: Template) -> Draw | None:
        for _ in range(MAX_REDRAWS):
            drawn = self._fill(template)
            if drawn.prompt not in self._taken:
                self._taken.add(drawn.prompt)
                return drawn
        return None

    def _fill(self, template: Template) -> Draw:
        values = self._slot_values(template)
        probabilities = [
            self.world.graded[name][chosen[0]]
            for name, chosen in values.items()
            if name in self.world.graded
        ]
        certain = 1.0 if template.kind == "refuse" else 0.0
        return Draw(
            prompt=self._opened(_substitute(template.text, values)),
            response=_capitalised(_substitute(template.response, values)),
            answer=_substitute(template.checked, values) or None,
            refuse_probability=max(probabilities, default=certain),
            template=template,
        )

    def _slot_values(self, template: Template) -> dict[str, list[str]]:
        values: dict[str, list[str]] = {}
        if template.facts:
            item, value = self.rng.choice(template.facts)
            values = {"item": [item], "value": [value]}
        names = template.slots
        for name in dict.fromkeys(names):
            if name not in values:
                choices = list(self.world.lists.get(name) or self.world.graded[name])
                values[name] = self.rng.sample(choices, names.count(name))
        return values

    def _opened(self, prompt: str) -> str:
        openers = self.world.openers
        opener = self.rng.choices(list(openers), weights=list(openers.values()))[0]
        if not opener:
            return _capitalised(prompt)
        return opener + (prompt if prompt.startswith("I ") else prompt[0].lower() + prompt[1:])


def _substitute(text: str, values: dict[str, list[str]]) -> str:
    turns = {name: cycle(chosen) for name, chosen in values.items()}
    return SLOT.sub(lambda match: next(turns[match[1]]), text)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _groups(sampler: Sampler, split: Split, sizes: Sizes) -> list[list[Row]]:
    groups: list[list[Row]] = []
    for category in CATEGORIES:
        groups += _category_groups(sampler, category, split, sizes)
    in_world = sampler.draw(sampler.world.select("answer", None, split), sizes.in_world)
    groups.append([_row(draw, None, draw.response, "answer") for draw in in_world])
    return groups


def _category_groups(
    sampler: Sampler, category: str, split: Split, sizes: Sizes
) -> tuple[list[Row], list[Row]]:
    refuse: list[Draw] = []
    answer: list[Draw] = []
    for draw in sampler.draw(sampler.world.select("borderline", category, split), sizes.borderline):
        chosen = refuse if sampler.rng.random() < draw.refuse_probability else answer
        chosen.append(draw)
    plain = sampler.world.select("refuse", category, split)
    refuse += sampler.draw(plain, sizes.refused - len(refuse))
    near = sampler.world.select("near_miss", category, split)
    answer += sampler.draw(near, sizes.near_misses - len(answer))
    return (
        [
            _row(draw, category, sampler.refusal(category, draw.template.about), "refuse")
            for draw in refuse
        ],
        [_row(draw, None, draw.response, "near_miss") for draw in answer],
    )


def _pairs(sampler: Sampler, sizes: PairSizes) -> list[Row]:
    rows: list[Row] = []
    for category in CATEGORIES:
        for number, draw in enumerate(_pair_draws(sampler, category, sizes)):
            pair = f"{category}-{number}"
            about = draw.template.about if draw.template.category == category else ""
            rows.append(_row(draw, category, sampler.refusal(category, about), "pair", pair))
            rows.append(_row(draw, None, draw.response, "pair", pair))
    return rows


def _pair_draws(sampler: Sampler, category: str, sizes: PairSizes) -> list[Draw]:
    templates = [t for t in sampler.world.templates if t.split == "train"]
    sampler.rng.shuffle(templates)
    in_world = [t for t in templates if t.category is None]
    own = [t for t in templates if t.category == category]
    others = [t for t in templates if t.category not in {None, category}]
    return [
        *sampler.draw(own, sizes.own),
        *sampler.draw(others, sizes.others),
        *sampler.draw(in_world, sizes.in_world),
    ]


def _row(
    draw: Draw, category: str | None, response: str, kind: Kind, pair: str | None = None
) -> Row:
    return Row(
        prompt=draw.prompt,
        category=category,
        response=response,
        answer=draw.answer if category is None else None,
        template=draw.template.id,
        pair=pair,
        kind=kind,
    )
