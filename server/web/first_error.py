"""Validation of vLLM's request models: it ends at the first wrong entry, and never with a crash."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic_core import SchemaValidator

_COLLECTIONS = frozenset({"list", "set", "frozenset", "tuple", "dict"})


def stop_at_first_error(*models: type[BaseModel]) -> None:
    """Makes models tell one wrong entry of a collection instead of all, and wrong types as such.

    pydantic tries each wrong entry against every member of a union, and keeps an error for each: of
    4096 empty items of ``/v1/responses`` a million, in 17 s that held the event loop. Validators of
    vLLM's that look into a field before pydantic has checked its type may trip over it, which would
    be an internal error (``structured_outputs: 5``).

    Args:
        models: Changed in place, before anything is built from their schemas.
    """
    for model in models:
        schema: Any = model.__pydantic_core_schema__
        _adapt(schema)
        # By themselves, not of validators that models within it have already.
        model.__pydantic_validator__ = SchemaValidator(schema, _use_prebuilt=False)


def _adapt(schema: Any) -> None:
    nodes = [schema]
    for node in nodes:  # which grow on the way
        if isinstance(node, dict):
            kind = node.get("type")  # a field of that name has a schema there
            if isinstance(kind, str) and kind in _COLLECTIONS:
                node["fail_fast"] = True
            elif kind == "function-before" and isinstance(node.get("function"), dict):
                node["type"] = "function-wrap"
                function = node["function"]
                node["function"] = {**function, "function": _leaving_types(function["function"])}
            nodes.extend(node.values())
        elif isinstance(node, list | tuple):
            nodes.extend(node)


def _leaving_types(validator: Callable[..., Any]) -> Callable[..., Any]:
    def validate(value: Any, handler: Callable[[Any], Any], *info: Any) -> Any:
        try:
            changed = validator(value, *info)
        except (AttributeError, LookupError) as error:
            handler(value)  # it knows which field has the wrong type
            raise ValueError(f"a field is not of its type: {error}") from error
        return handler(changed)

    return validate
