"""Random JSON of vLLM's own types, so that no list of ours says which parts and items there are."""

import collections.abc
import random
import types
import typing
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

import typing_extensions
from pydantic import BaseModel

WRAPPERS = (
    Annotated,
    Required,
    NotRequired,
    typing_extensions.Required,
    typing_extensions.NotRequired,
)
MOST_DEPTH = 6
OPTIONAL_SHARE = 0.3


def members(kind: Any) -> list[Any]:
    """Returns the types that a union is made of, and a type that is none by itself."""
    if get_origin(kind) in WRAPPERS:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for argument in get_args(kind) for inner in members(argument)]
    return [kind]


def type_names(kind: Any) -> set[str]:
    """Returns what a union's members call themselves in their field `type`."""
    names: set[str] = set()
    for member in members(kind):
        for literal in members(_fields(member).get("type")):
            names |= set(get_args(literal)) if get_origin(literal) is Literal else set()
    return names


def made(kind: Any, rng: random.Random, texts: list[str], depth: int = 0) -> Any:
    """Returns a JSON value of a type: required fields always, the others at times.

    Args:
        kind: An annotation: of TypedDicts, pydantic models, unions, literals, containers.
        rng: The only source of chance.
        texts: What strings are drawn from.
        depth: How deep the value lies.
    """
    chosen = rng.choice(members(kind))
    origin, arguments = get_origin(chosen), get_args(chosen)
    if origin is Literal:
        return rng.choice(arguments)
    if fields := _fields(chosen):
        wanted = [
            name
            for name in fields
            if name in _required(chosen) or (depth < MOST_DEPTH and rng.random() < OPTIONAL_SHARE)
        ]
        return {name: made(fields[name], rng, texts, depth + 1) for name in wanted}
    if origin in (list, collections.abc.Iterable, collections.abc.Sequence):
        count = rng.randint(0, 2) if depth < MOST_DEPTH else 0
        return [made(arguments[0], rng, texts, depth + 1) for _ in range(count)]
    if chosen is dict or origin is dict:
        return {"a": rng.choice(texts)}
    if chosen is type(None):
        return None
    if chosen in (bool, int, float):
        return chosen(rng.randint(0, 1))
    return rng.choice(texts)


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if typing_extensions.is_typeddict(kind):
        return typing.get_type_hints(kind, include_extras=True)
    return {}


def _required(kind: Any) -> frozenset[str]:
    if typing_extensions.is_typeddict(kind):
        required: frozenset[str] = kind.__required_keys__
        return required
    return frozenset(name for name, field in kind.model_fields.items() if field.is_required())
