"""Validation of vLLM's request models ends at the first wrong entry of a list or object."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import SchemaValidator

_COLLECTIONS = frozenset({"list", "set", "frozenset", "tuple", "dict"})


def stop_at_first_error(*models: type[BaseModel]) -> None:
    """Makes models tell one wrong entry of a collection instead of all.

    pydantic tries each wrong entry against every member of a union, and keeps an error for each: of
    4096 empty items of ``/v1/responses`` a million, in 17 s that held the event loop.

    Args:
        models: Changed in place, before anything is built from their schemas.
    """
    for model in models:
        schema: Any = model.__pydantic_core_schema__
        _mark_collections(schema)
        # By themselves, not of validators that models within it have already.
        model.__pydantic_validator__ = SchemaValidator(schema, _use_prebuilt=False)


def _mark_collections(schema: Any) -> None:
    nodes = [schema]
    for node in nodes:  # which grow on the way
        if isinstance(node, dict):
            kind = node.get("type")  # a field of that name has a schema there
            if isinstance(kind, str) and kind in _COLLECTIONS:
                node["fail_fast"] = True
            nodes.extend(node.values())
        elif isinstance(node, list | tuple):
            nodes.extend(node)
