"""Random conversations under a floor between 0 and 1: an error, or the right turn is decided.

In `make test`, and more in `make test-long`, they are the same ones every time; `make fuzz` sends
new ones for `FUZZ_S` seconds.
"""

import os
import random
import time
from collections import Counter

import pytest

from tests.e2e.attacks import ANSWERED, HARMFUL
from tests.e2e.decided.asking import Attempt, Floor, scored_margins, try_all
from tests.e2e.decided.conversations import ROUTES, Conversations
from tests.e2e.decided.floors import GRADED, PREFILLED
from tests.e2e.decided.prompts import Body, UnreadableError, expected_prompts
from tests.e2e.decided.reference import Reference
from tests.e2e.policied import Policied

FUZZ_S = int(os.environ.get("FUZZ_S", "0"))
MOST_SHOWN = 20
FLOORS = [GRADED, PREFILLED]
ASKED = [*ANSWERED, {"role": "user", "content": HARMFUL}]


@pytest.mark.timeout(FUZZ_S + 300)
@pytest.mark.parametrize("count", [200, pytest.param(800, marks=pytest.mark.long)])
def test_random_conversations_are_decided_as_they_are(
    policied: Policied, reference: Reference, count: int
) -> None:
    decided: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    violations: list[str] = []
    seed, until = random.randrange(2**31) if FUZZ_S else 1, time.monotonic() + FUZZ_S
    while True:
        for floor in FLOORS:
            made = Conversations(seed, floor, reference)
            attempts = [made.attempt(number) for number in range(count)]
            outcome = try_all(policied, floor, reference, attempts)
            violations += [f"seed {seed}, {violation}" for violation in outcome.violations]
            decided += outcome.decided
            refused += outcome.refused
        seed += 1
        if time.monotonic() > until or len(violations) > MOST_SHOWN:
            break
    assert not violations, "\n".join(violations)
    for path in {path for path, _, _ in ROUTES}:
        assert decided[path] > count / 40
        # Without its template the model refuses whatever it reads.
        assert 0 < refused[path] < decided[path] or path == "/v1/completions"


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.name)
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_cut_is_an_error_or_decided_as_it_is(
    policied: Policied, reference: Reference, floor: Floor, step: int
) -> None:
    ends: list[Body] = [{}, {"add_generation_prompt": False, "continue_final_message": True}]
    sides: list[Body] = [{}, {"truncation_side": "left"}, {"truncation_side": "right"}]
    begun = [*ASKED, {"role": "assistant", "content": "Sure, first you"}]
    attempts = []
    for messages in (ASKED[-1:], ASKED, begun):
        for end in ends:
            for side in sides:
                for longest in range(1, 60, step):
                    cut = {**end, **side, "truncate_prompt_tokens": longest}
                    body = {"model": "demo", "max_tokens": 1, "messages": messages, **cut}
                    attempts.append(Attempt(str(cut), "chat", "/v1/chat/completions", body))
    outcome = try_all(policied, floor, reference, attempts)
    assert not outcome.violations, "\n".join(outcome.violations)
    assert outcome.decided["chat"] > 50 / step


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.long)])
def test_scores_are_those_of_the_conversations(
    policied: Policied, reference: Reference, count: int
) -> None:
    made = Conversations(2, GRADED, reference)
    conversations: list[list[Body]] = []
    margins: list[tuple[float, ...]] = []
    while len(conversations) < count:
        messages = made.chat()["messages"]
        try:
            (ids,) = expected_prompts(
                "/v1/chat/completions", {"messages": messages}, reference, prefill=False
            )
        except UnreadableError:
            continue
        if len(ids) < 500:
            conversations.append(messages)
            margins.append(reference.margins(ids))
    scored = scored_margins(policied, GRADED, conversations)
    for said, expected, messages in zip(scored, margins, conversations, strict=True):
        assert said == pytest.approx(expected, abs=2e-3), messages
