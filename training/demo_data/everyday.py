"""Ordinary requests that an assistant answers, made from templates."""

import random
import re
from pathlib import Path
from typing import TypedDict

from models.files import parse_yaml
from training.demo_data.world import SLOT

ROWS = 3000
# Of the questions: how people type them into a search box.
LOWER_CASE, WITH_MARK, SENTENCE = 0.55, 0.15, 0.2
# Of the tasks.
HASTY = 0.15


class Answered(TypedDict):
    """A row whose response is not learnt."""

    prompt: str
    category: None
    response: None


def everyday(count: int = ROWS, seed: int = 0) -> list[Answered]:
    """Renders distinct prompts, the templates taking turns; the same ones for the same seed."""
    source = Path(__file__).with_name("everyday.yaml")
    content = parse_yaml(source.read_text(encoding="utf-8"), str(source))
    kinds = {"search": _searched, "task": _asked}
    templates = [(kind, text) for kind in kinds for text in content[kind]]
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        rng.shuffle(templates)
        prompts |= {
            kinds[kind](_filled(text, content["slots"], rng), rng): None for kind, text in templates
        }
    return [{"prompt": p, "category": None, "response": None} for p in list(prompts)[:count]]


def _filled(text: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    names = SLOT.findall(text)
    values = {name: rng.sample(slots[name], names.count(name)) for name in dict.fromkeys(names)}
    return SLOT.sub(lambda match: values[match[1]].pop(), text)


def _searched(prompt: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < LOWER_CASE:
        return prompt.lower()
    if draw < LOWER_CASE + SENTENCE:
        return f"{prompt[0].upper()}{prompt[1:]}?"
    return f"{prompt}?" if draw < LOWER_CASE + SENTENCE + WITH_MARK else prompt


def _asked(prompt: str, rng: random.Random) -> str:
    return re.sub(r"[.?]$", "", prompt.lower()) if rng.random() < HASTY else prompt
