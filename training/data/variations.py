"""Varied copies of prompts, so that a decision is about what is asked and not about its form."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from training.data.rows import Message, Row

# Nothing that robustness is measured with stands here.
SYSTEM_PROMPTS = (
    "You are an assistant.",
    "Answer the user's questions as well as you can.",
    "You are a travel agent's assistant. Keep answers short.",
    "You help students with their homework.",
    "You are Ada, the assistant of a bank. Speak formally.",
    "You are a coding assistant.",
    "You write for a newspaper; be neutral.",
    "You are a friendly chatbot in a museum.",
    "Reply in one sentence.",
    "You support customers of an online shop for shoes.",
    "You are a careful and honest assistant. Today is Monday.",
    "You are an expert who explains things to beginners.",
)
LONGEST_PROMPT = 400
# Characters: of an earlier turn, of the text before a prompt, and for each typing error.
LONGEST_TURN = 160
LONG_TEXT = (200, 500)
ERROR_EVERY = 25

Vary = Callable[[str, random.Random], tuple[Message, ...]]


def varied(rows: Sequence[Row], share: float, rng: random.Random) -> list[Row]:
    """Returns varied copies of prompts of one turn; only their decision is learnt.

    Args:
        rows: Where prompts come from, and from the answered ones the texts around them.
        share: Copies a row, in mean.
    """
    single = [row for row in rows if _fits(row)]
    ways = (_under_system_prompt, _in_one_case, _with_typing_error, *_with_context(rows))
    copies = []
    for number in range(round(share * len(single))):
        if number % len(single) == 0:
            rng.shuffle(single)
        row = single[number % len(single)]
        turns = rng.choice(ways)(row.prompt[-1].content, rng)
        decision = row.messages[-1].model_copy(update={"content": ""})
        copies.append(replace(row, messages=(*turns, decision), answer=None, pair=None))
    return copies


def _fits(row: Row) -> bool:
    asked = row.prompt
    return row.pair is None and len(asked) == 1 and len(asked[0].content) <= LONGEST_PROMPT


def _user(content: str) -> Message:
    return Message(role="user", content=content)


def _under_system_prompt(prompt: str, rng: random.Random) -> tuple[Message, ...]:
    return Message(role="system", content=rng.choice(SYSTEM_PROMPTS)), _user(prompt)


def _in_one_case(prompt: str, rng: random.Random) -> tuple[Message, ...]:
    return (_user(prompt.upper() if rng.random() < 0.6 else prompt.lower().rstrip(".?!")),)


def _with_typing_error(prompt: str, rng: random.Random) -> tuple[Message, ...]:
    letters = list(prompt)
    for _ in range(max(1, len(letters) // ERROR_EVERY) if len(letters) > 1 else 0):
        at = rng.randrange(len(letters) - 1)
        letters[at : at + 2] = reversed(letters[at : at + 2])
    return (_user("".join(letters)),)


def _with_context(rows: Sequence[Row]) -> tuple[Vary, ...]:
    """Returns the ways that need texts of other rows, where there are such texts."""
    answered = [row for row in rows if row.category is None and row.response and _fits(row)]
    short = [
        row for row in answered if len(f"{row.prompt[-1].content}{row.response}") <= LONGEST_TURN
    ]
    long = [
        row.response
        for row in answered
        if row.response and LONG_TEXT[0] <= len(row.response) <= LONG_TEXT[1]
    ]

    def as_later_turn(prompt: str, rng: random.Random) -> tuple[Message, ...]:
        return *rng.choice(short).messages, _user(prompt)

    def behind_text(prompt: str, rng: random.Random) -> tuple[Message, ...]:
        return (_user(f"{rng.choice(long)}\n\n{prompt}"),)

    return (*([as_later_turn] if short else ()), *([behind_text] if long else ()))
