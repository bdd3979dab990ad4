"""docs/training.md's tables: every field of a recipe with its default, and the messages."""

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from tests.docs.test_readme import ROOT
from tests.docs.test_training import cells_of, section
from training.config.recipe import TrainConfig


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the path and the declaration of every field that a recipe may have."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        annotations = (field.annotation, *field.metadata)
        for part in {m for a in annotations for m in _models_in(a)}:
            deeper = f"{path}[]." if name in ("train", "data") and "Source" in part.__name__ else ""
            yield from _fields(part, deeper or f"{path}.")


def _known_fields() -> dict[str, Any]:
    known: dict[str, Any] = {}
    for path, field in _fields(TrainConfig, ""):
        if path.startswith("evaluation.data[]."):  # as in data.train
            continue
        known[re.sub(r"^loss\.\w+\.(q|gamma)\.", "*.q.", path)] = field
    return known


def _told(field: Any) -> str | None:
    """Returns a default as the page writes it; None where it is told in words."""
    if field.is_required():
        return "needed"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "null"
    if isinstance(default, BaseModel) or (isinstance(default, dict) and default):
        return None
    if default in ({}, ()):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_reference_has_every_field_with_its_default() -> None:
    table = {cells[0].strip("`"): cells[1] for cells in cells_of(section(9))}
    known = _known_fields()

    assert {"optimisation.packing", "data.train[].bad_rows", "*.q.over"} <= known.keys()
    assert table.keys() == known.keys()
    for path, field in known.items():
        told = _told(field)
        try:
            same = told is None or float(table[path]) == float(told)
        except ValueError:
            same = table[path] == told
        assert same, f"{path}: the page says {table[path]}, it is {told}"


def _sentences() -> str:
    """Returns the package's texts, with a mark where something is put in."""
    texts: list[str] = []
    for path in sorted((ROOT / "training").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
    return "\n".join(texts)


def test_messages_on_the_page_are_the_package_s() -> None:
    sentences = _sentences()
    messages = [cells[0].strip("`") for cells in cells_of(section(10))]

    assert len(messages) > 10
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in sentences, message
