"""Bodies made from a JSON schema: any string in them, and any free key, is a slot to write into."""

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Slots = dict[str, str]  # What a slot's own text, like "slot12", is replaced by.
SLOT = re.compile(r"slot\d+")


class Maker:
    """Makes bodies that a schema allows, or nearly.

    Args:
        schema: As pydantic writes it.
        rng: Chooses.
        words: What strings of some fields are, of whose words the schema says nothing.
    """

    def __init__(
        self, schema: dict[str, Any], rng: random.Random, words: dict[str, list[str]]
    ) -> None:
        self._schema = schema
        self._rng = rng
        self._words = words
        self._slots = 0

    def body(self, names: list[str]) -> dict[str, Any]:
        """Returns a body that has the fields named."""
        self._slots = 0
        return {name: self._made(self._schema["properties"][name], name, 0) for name in names}

    def _made(self, schema: dict[str, Any], name: str, depth: int) -> Any:
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        makers: dict[str, Callable[[], Any]] = {
            "string": lambda: self._string(name),
            "object": lambda: self._object(schema, depth),
            "array": lambda: self._array(schema, name, depth),
            "integer": lambda: int(schema.get("minimum", 1)),
            "number": lambda: float(schema.get("minimum", 1)),
            "boolean": lambda: self._rng.random() < 0.5,
            "null": lambda: None,
        }
        kinds = ["string", "string", "array", "object"] if depth < 6 else ["string"]
        return makers[schema.get("type") or self._rng.choice(kinds)]()

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while True:
            if "$ref" in schema:
                schema = self._schema["$defs"][schema["$ref"].rpartition("/")[2]]
            elif kinds := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
                kinds = [kind for kind in kinds if kind.get("type") != "null"]
                schema = self._rng.choice(kinds)
            else:
                return schema

    def _slot(self) -> str:
        self._slots += 1
        return f"slot{self._slots}"

    def _string(self, name: str) -> str:
        if name in self._words:
            return self._rng.choice(self._words[name])
        if self._rng.random() < 0.5:
            return self._slot()
        return json.dumps({self._key(): self._slot(), self._key(): [self._slot()]})

    def _key(self) -> str:
        known = self._words["key"]
        return self._slot() if self._rng.random() < 0.8 else self._rng.choice(known)

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        count = self._rng.choice((1, 1, 1, 2, 3)) if depth < 6 else 1
        return [self._made(schema.get("items", {}), name, depth + 1) for _ in range(count)]

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        fields = schema.get("properties", {})
        required = schema.get("required", [])
        likely = 0.5 if depth < 6 else 0.1
        made = {
            name: self._made(field, name, depth + 1)
            for name, field in fields.items()
            if name in required or self._rng.random() < likely
        }
        free = schema.get("additionalProperties", {})
        if free is not False and (not fields or self._rng.random() < 0.2):
            free = free if isinstance(free, dict) else {}
            made[self._key()] = self._made(free, "", depth + 2)
        return made


def slots_of(node: Any, path: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yields a body's slots in their order: the field, the slot, and whether it is a key."""
    if isinstance(node, str):
        for slot in SLOT.findall(node):
            yield path, slot, f'"{slot}":' in node
    elif isinstance(node, list):
        for entry in node:
            yield from slots_of(entry, path)
    elif isinstance(node, dict):
        for key, entry in node.items():
            if SLOT.fullmatch(key):
                yield f"{path}.*", key, True
            yield from slots_of(entry, f"{path}.{'*' if SLOT.fullmatch(key) else key}".lstrip("."))


def filled(node: Any, slots: Slots, rng: random.Random) -> Any:
    """Returns a body with text in its slots; in JSON within a string it is escaped at random."""

    def escaped(match: re.Match[str]) -> str:
        text = slots.get(match[0], match[0])
        return "".join(
            f"\\u{ord(c):04x}" if c in '"\\\n' or rng.random() < 0.3 else c for c in text
        )

    if isinstance(node, str):
        if node.startswith("{"):
            return SLOT.sub(escaped, node)
        return slots.get(node, node)
    if isinstance(node, list):
        return [filled(entry, slots, rng) for entry in node]
    if isinstance(node, dict):
        return {slots.get(k, k): filled(entry, slots, rng) for k, entry in node.items()}
    return node
