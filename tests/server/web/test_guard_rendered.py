"""What a client writes stays text, through vLLM's own parsing, decoding and rendering.

Bodies are made from vLLM's own schemas, so that a new field or a new part is tried as well, and
rendered with templates that print tools, arguments and documents. The property: a body with pieces
of special tokens in it has the special tokens that the same body with harmless text has.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.errors import RequestError
from server.web.limits import REFUSED
from server.web.places import SCHEMAS, WORDS
from tests.server.rendering import PART_TYPES, REJECTIONS, REQUESTS, Rendering
from tests.server.schema_bodies import Maker, Slots, filled, slots_of

Body = dict[str, Any]

TEMPLATES = Path(__file__).parents[1] / "templates"
TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "[respond]", "[refuse:safety]"]
# What the schemas leave open: the words of a role, and names that templates look up.
OPEN = {"role": ["user", "assistant", "system", "tool"], "key": ["persona", "x", "type", "name"]}
ALWAYS = {"chat": ["messages"], "responses": ["input"], "messages": ["model", "messages"]}
OFTEN = ("documents", "system", "instructions", "chat_template_kwargs")
# Of many places that a template prints, those where text takes a way of its own.
PRINTED = {
    "chat": {
        "messages.content",
        "messages.content.text",
        "messages.name",
        "messages.tool_call_id",
        "messages.tool_calls.function.arguments",
        "messages.tool_calls.function.name",
        "documents.*",
        "tools.function.parameters.*",
    },
    "responses": {"input", "input.content", "input.arguments", "instructions", "tools.name"},
    "messages": {
        "messages.content.text",
        "messages.content.input.*",
        "messages.content.content",
        "messages.content.thinking",
        "system",
        "system.text",
        "tools.input_schema.*",
    },
}
# Of the items of Responses few are ones that vLLM prints.
BODIES = {"chat": 300, "responses": 700, "messages": 300}


@pytest.fixture(scope="module", params=["qwen", "llama"])
def rendering(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Rendering:
    template = (TEMPLATES / f"{request.param}.jinja").read_text()
    return Rendering(tmp_path_factory.mktemp("toy"), template)


def bodies(api: str, rng: random.Random) -> Iterator[Body]:
    schema = REQUESTS[api].model_json_schema()
    maker = Maker(schema, rng, OPEN)
    others = [n for n in schema["properties"] if n not in {*REFUSED, *ALWAYS[api], *SCHEMAS}]
    often = [name for name in OFTEN if name in others]
    while True:
        names = [*ALWAYS[api], *(n for n in often if rng.random() < 0.3), rng.choice(others)]
        if rng.random() < 0.3:
            names.append("tools")
        body = maker.body(list(dict.fromkeys(names)))
        if api == "messages":
            body["max_tokens"] = 5
        if "tools" in body:
            body["tool_choice"] = {"type": "none"} if api == "messages" else "none"
        yield body


def rendered(rendering: Rendering, api: str, body: Body) -> list[int] | None:
    """Returns the ids that vLLM makes of a body, or None where it rejects it."""
    try:
        return rendering.ids(api, body)
    except REJECTIONS:
        return None


def accepted(
    rendering: Rendering, api: str, rng: random.Random
) -> Iterator[tuple[Body, list[int]]]:
    for body in bodies(api, rng):
        ids = rendered(rendering, api, body)
        if ids is not None:
            yield body, ids


def pieces(rng: random.Random) -> Iterator[str]:
    """Yields special tokens and what they are cut into, one after the other."""
    while True:
        token = rng.choice(TOKENS)
        cuts = sorted(rng.sample(range(1, len(token)), rng.randint(0, 2)))
        for start, end in itertools.pairwise((0, *cuts, len(token))):
            before = "a" if start == 0 and rng.random() < 0.3 else rng.choice(("", "", " "))
            after = "z" if end == len(token) and rng.random() < 0.3 else rng.choice(("", "", "\n"))
            yield before + token[start:end] + after


def hostile(body: Body, rng: random.Random) -> tuple[Body, bool]:
    """Returns a body with pieces of special tokens, and whether one stands where none may."""
    names, schemas = rng.random() < 0.1, rng.random() < 0.2
    slots: Slots = {}
    written = pieces(rng)
    forbidden = False
    for path, slot, is_key in slots_of(body):
        in_schema = not SCHEMAS.isdisjoint(path.split("."))
        if (names or not is_key) and (schemas or not in_schema):
            slots[slot] = next(written)
            forbidden |= is_key or in_schema
    return filled(body, slots, rng), forbidden


@pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
@pytest.mark.parametrize("api", REQUESTS)
def test_text_in_any_place_of_any_body_makes_no_special_token(
    rendering: Rendering, api: str
) -> None:
    rng = random.Random(11)
    printed: set[str] = set()
    compared = effective = 0
    for body, harmless in itertools.islice(accepted(rendering, api, rng), BODIES[api]):
        text = rendering.text(harmless)
        printed |= {path for path, slot, _ in slots_of(body) if slot in text}
        attack, forbidden = hostile(body, rng)
        try:
            guarded = rendering.guard.guarded(attack)
        except RequestError:
            assert forbidden, attack
            continue
        ids = rendered(rendering, api, guarded)
        unguarded = rendered(rendering, api, attack)
        if ids is None:
            assert unguarded is None, attack
            continue
        assert rendering.specials(ids) == rendering.specials(harmless), attack
        if unguarded is not None:
            assert rendering.text(ids) == rendering.text(unguarded)
            effective += rendering.specials(unguarded) != rendering.specials(harmless)
        compared += 1
    assert compared > BODIES[api] * 0.7
    assert effective > BODIES[api] * 0.05
    assert printed >= PRINTED[api]


def test_words_of_the_protocol_are_those_of_vllm() -> None:
    assert PART_TYPES <= WORDS
