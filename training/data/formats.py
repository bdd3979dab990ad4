"""How the rows of a file read as ours: columns, category names, chats, CoCoNot."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from training.config.data import Source, label
from training.config.sets import COCONOT_LABELS, SETS, PublicSet
from training.data.rows import BadRowError

Values = Mapping[str, Any]

COCONOT_ANSWERED = ("contrast", "pref")
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant"}


class Cells(dict[str, Any]):
    """Cells of a text table, where an empty one is no value rather than an empty text."""


def cells_as_values(header: Sequence[str], cells: Sequence[str]) -> Values | BadRowError:
    """Returns a line of a text table by column name."""
    if len(cells) == len(header):
        return Cells(zip(header, cells, strict=True))
    return BadRowError(
        f"has {len(cells)} cells, the header {len(header)}; a cell with a delimiter or a line "
        "break in it must be in double quotes"
    )


def check_columns(name: str, columns: Iterable[str], source: Source) -> None:
    """Says once for the whole table what every row of it would lack."""
    found = list(columns)
    if not found:
        raise ConfigError(f"{name}: is empty; its first line must name the columns")
    if repeated := sorted({column for column in found if found.count(column) > 1}):
        raise ConfigError(f"{name}: the column {repeated[0]!r} is a duplicate")
    if source.set is not None:
        _check_set_columns(name, found, SETS[source.set])
        return
    needed = {field: to for field, to in source.columns.items() if to is not None}
    if source.format == "rows" and not {"messages", needed.get("messages")} & set(found):
        needed = {"prompt": "prompt", "response": "response", "category": "category", **needed}
        if source.category is not None:
            del needed["category"]
        if source.columns.get("response", "") is None:
            del needed["response"]
    for field, column in needed.items():
        if column not in found:
            raise ConfigError(
                f"{name}: has no column {column!r}; its columns are {', '.join(found)}; say which "
                f"of them is the {field} with columns: {{{field}: NAME}}{_without(field)}"
                f"{_as_one_column(found)}"
            )


def _check_set_columns(name: str, found: Sequence[str], known: PublicSet) -> None:
    needed = [known.prompt, *((column,) for column in (known.label, *known.only) if column)]
    for columns in needed:
        if not set(columns) & set(found):
            raise ConfigError(
                f"{name}: is no copy of that set: it has no column {' or '.join(columns)}; its "
                f"columns are {', '.join(found)}"
            )


def _as_one_column(found: Sequence[str]) -> str:
    if len(found) > 1 or not any(delimiter in found[0] for delimiter in ",;|\t"):
        return ""
    return "; columns are separated by commas in a .csv file, by tabs in a .tsv file"


def _without(field: str) -> str:
    return {
        "category": ", or what all its rows are with category: NAME",
        "response": ", or that there is none with columns: {response: null}",
    }.get(field, "")


def _from_rows(values: Values, source: Source) -> Values:
    row = _renamed(values, source)
    if source.category is not None:
        return {**row, "category": source.category}
    for field in ("category", "near_miss"):
        if field in row:
            row[field] = _category(row[field], source.categories)
    if isinstance(row.get("messages"), list):
        row["messages"] = [_with_category(turn, source.categories) for turn in row["messages"]]
    return row


def _renamed(values: Values, source: Source) -> dict[str, Any]:
    row = dict(values)
    for field, column in source.columns.items():
        if column is not None and column not in values:
            raise BadRowError(f"{field}: there is no {column!r}; there are {', '.join(values)}")
        row[field] = None if column is None else values[column]
    if isinstance(values, Cells):
        for field in ("messages", "response", "answer", "pair", "near_miss"):
            if row.get(field) == "":
                row[field] = None
    if row.get("messages", "") is None:
        del row["messages"]
    if isinstance(row.get("messages"), str):
        row["messages"] = _turns_in(row["messages"])
    return row


def _turns_in(cell: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"messages: is no JSON: {error}") from error


def _category(value: Any, categories: Mapping[str, str | None]) -> Any:
    if value is None:
        return None
    return categories.get(label(value), label(value))


def _with_category(turn: Any, categories: Mapping[str, str | None]) -> Any:
    if isinstance(turn, dict) and turn.get("category") is not None:
        return {**turn, "category": _category(turn["category"], categories)}
    return turn


def _from_chat(values: Values, source: Source) -> Values:
    row = _renamed(values, source)
    turns = row.get("messages", row.get("conversations"))
    if turns is None:
        asked: dict[str, Any] = {f: row[f] for f in ("prompt", "response") if f in row}
        return {**asked, "category": None}
    if not isinstance(turns, list):
        raise BadRowError("messages: must be a list of turns")
    messages = [_chat_turn(turn) for turn in turns]
    # UltraChat repeats the first user turn as `prompt`; others keep it there alone.
    if row.get("prompt") and not any(turn["role"] == "user" for turn in messages[:2]):
        messages.insert(0, {"role": "user", "content": row["prompt"]})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRowError("messages: no turn is the assistant's")
    return {"messages": messages}


def _chat_turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRowError("messages: a turn must be an object with role and content")
    role = turn.get("role", turn.get("from"))
    content = _text_of(turn.get("content", turn.get("value")))
    if not content.strip():
        raise BadRowError(f"messages: a turn of role {role!r} has no text")
    return {"role": SPEAKERS.get(str(role), role), "content": content}


def _text_of(content: Any) -> str:
    """Returns the text of a turn, which may come as a list of parts."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise BadRowError("messages: a turn has parts that are no text")
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def _from_coconot(values: Values, source: Source) -> Values:
    row = _renamed(values, source)
    named = {**COCONOT_LABELS, **source.categories}
    category = _category(row.get("category"), named)
    answered = _is_answered(row, source)
    if category is None and not answered:
        raise BadRowError(
            "category: is missing; only CoCoNot's contrast and preference rows have none"
        )
    return {
        "prompt": row.get("prompt"),
        "category": None if answered else category,
        "near_miss": category if answered else None,
        "response": _last_reply(row.get("response", row.get("chosen"))) or None,
    }


def _last_reply(response: Any) -> Any:
    """Returns the text of a response; those of the preference file are whole conversations."""
    if not isinstance(response, list):
        return response
    return _chat_turn(response[-1])["content"] if response else None


def _is_answered(row: Values, source: Source) -> bool:
    if row.get("is_refusal") is not None:
        return label(row["is_refusal"]) in ("0", "false")
    if row.get("chosen") is not None:
        return True
    if source.subset is not None:
        return source.subset in COCONOT_ANSWERED
    path = Path(source.name)
    words = re.split(r"[^a-z]+", f"{path.parent.name} {path.stem}".lower())
    return any(word in COCONOT_ANSWERED for word in words)


def _from_set(values: Values, source: Source) -> Values | None:
    assert source.set is not None
    known = SETS[source.set]
    label: Any = None if known.label is None else values.get(known.label)
    varied = any(values.get(column) != value for column, value in known.only.items())
    if varied or (known.label is not None and label is None):
        return None
    refused = known.refused if isinstance(known.refused, Mapping) else {label: known.refused}
    if label not in refused:
        raise BadRowError(f"{known.label}: {label!r} is none of {', '.join(map(str, refused))}")
    category = refused[label]
    if known.answered:
        category, looks_like = None, category
    else:
        looks_like = known.looks_like if category is None else None
    return {
        "prompt": _prompt_of(values, known),
        "category": _renamed_category(category, source),
        "near_miss": _renamed_category(looks_like, source),
        "response": None,
    }


def _renamed_category(category: str | None, source: Source) -> str | None:
    if category is None or source.category is not None:
        return category and source.category
    return source.categories.get(category, category)


def _prompt_of(values: Values, known: PublicSet) -> Any:
    prompt = _first(values, known.prompt)
    if isinstance(prompt, list):
        prompt = prompt[0] if prompt else None
    context = _first(values, known.context)
    # As HarmBench's own baselines put it.
    return f"{context}\n\n---\n\n{prompt}" if context and prompt else prompt


def _first(values: Values, columns: Sequence[str]) -> Any:
    return next((values[column] for column in columns if column in values), None)


# What returns None is no part of the data set.
FORMATS: Mapping[str, Callable[[Values, Source], Values | None]] = {
    "rows": _from_rows,
    "chat": _from_chat,
    "coconot": _from_coconot,
    "set": _from_set,
}
