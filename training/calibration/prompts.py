"""Prompts with known categories, read from the files that a calibration is asked for with."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Literal, cast, get_args

from pydantic import ValidationError

from models.calibration import LEAST_PROMPTS
from models.errors import ConfigError
from training.config.data import Source
from training.data.rows import Row
from training.data.sources import identify, read_source

NULL = ("", "null")

Format = Literal["rows", "chat", "coconot"]


@dataclass(frozen=True)
class PromptFiles:
    """Files of prompts, and how to read them.

    Attributes:
        paths: The files, of one format.
        format: How they read.
        columns: Our field → the files' column, where they differ.
        categories: The files' label → our category, None for "is to be answered".
        limit: At most so many prompts, drawn at random; None for all.
        seed: Of that draw.
    """

    paths: tuple[Path, ...]
    format: Format = "rows"
    columns: Mapping[str, str] = field(default_factory=dict)
    categories: Mapping[str, str | None] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0


def checked_format(text: str) -> Format:
    """Returns the format of that name.

    Raises:
        ConfigError: There is none.
    """
    for known in get_args(Format):
        if text == known:
            return cast(Format, known)
    raise ConfigError(f"--format {text!r}: must be one of {', '.join(get_args(Format))}")


def labels(texts: Sequence[str]) -> dict[str, str | None]:
    """Returns `LABEL=CATEGORY` texts as a mapping; an empty category and `null` become None.

    Raises:
        ConfigError: One has no `=`, or a label stands there twice.
    """
    pairs = [_split(text, "--map", "LABEL=CATEGORY", from_right=True) for text in texts]
    return {label: None if name in NULL else name for label, name in _once(pairs, "--map")}


def columns(texts: Sequence[str]) -> dict[str, str]:
    """Returns `FIELD=COLUMN` texts as a mapping.

    Raises:
        ConfigError: One has no `=`, or a field stands there twice.
    """
    pairs = [_split(text, "--column", "FIELD=COLUMN", from_right=False) for text in texts]
    return dict(_once(pairs, "--column"))


def _split(text: str, option: str, form: str, *, from_right: bool) -> tuple[str, str]:
    left, equals, right = text.rpartition("=") if from_right else text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text!r}: must be of the form {form}")
    return left, right


def _once(pairs: list[tuple[str, str]], option: str) -> list[tuple[str, str]]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"{option}: {repeated[0]!r} stands there twice")
    return pairs


def read_prompts(files: PromptFiles, names: Sequence[str]) -> list[Row]:
    """Reads prompts and checks that they can make a calibration.

    A checkpoint of one category takes every refusal as of that category, as in training.

    Args:
        files: Where they are.
        names: The checkpoint's categories.

    Raises:
        ConfigError: A row is wrong, a prompt has two categories, a label is mapped to an unknown
            one, or a category has too few prompts.
    """
    known: Collection[str] = names if len(names) > 1 else _Everything()
    _check_labels(files.categories, known)
    try:
        rows = [row for source in _sources(files) for row in read_source(source, known)]
    except ConfigError as error:
        raise ConfigError(f"{error.message}{_on_the_command_line(error.message)}") from error
    if len(names) == 1:
        rows = [_of_one_category(row, names[0]) for row in rows]
    _check_contradictions(rows)
    where = ", ".join(str(path) for path in files.paths)
    if files.limit is not None and files.limit < len(rows):
        rows = Random(files.seed).sample(rows, files.limit)
        where += f" (with --limit {files.limit})"
    _check_counts(rows, names, where)
    return rows


def repeated(rows: Sequence[Row]) -> int:
    """Returns how many prompts say what an earlier one says."""
    return len(rows) - len({row.prompt for row in rows})


def identified(files: PromptFiles) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name, by its path where two have one name."""
    found: dict[str, str] = {}
    for source in _sources(files):
        for name, digest in identify(source).items():
            found[Path(name).name if Path(name).name not in found else name] = digest
    return found


class _Everything(Collection[str]):
    """The category names of a checkpoint that has only one: any."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name.strip())

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _of_one_category(row: Row, name: str) -> Row:
    turns = (
        turn if turn.category is None else turn.model_copy(update={"category": name})
        for turn in row.messages
    )
    return replace(row, messages=tuple(turns))


def _sources(files: PromptFiles) -> list[Source]:
    if not files.paths:
        raise ConfigError("no data: --data FILE names the prompts (`rheostat demo-data` has some)")
    try:
        return [
            Source(
                path=str(path),
                format=files.format,
                # What the model is to say is not asked for.
                columns={**(files.columns), "response": None},
                categories=dict(files.categories),
            )
            for path in files.paths
        ]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        option = {"columns": "--column", "categories": "--map"}.get(str(first["loc"][0]), where)
        raise ConfigError(f"{option}: {where}: {first['msg']}") from error


def _on_the_command_line(message: str) -> str:
    hints = {
        "columns: {": "--column prompt=NAME",
        "categories: {": "--map LABEL=CATEGORY, or --map LABEL=null where it is to be answered",
        "is unknown; known are": "--map LABEL=CATEGORY translates",
    }
    told = [hint for sign, hint in hints.items() if sign in message]
    return f" (here: {'; '.join(told)})" if told else ""


def _check_labels(categories: Mapping[str, str | None], known: Collection[str]) -> None:
    for text, name in categories.items():
        if name is not None and name not in known:
            raise ConfigError(
                f"--map {text}={name}: {name!r} is none of the checkpoint's categories, "
                f"{', '.join(known)}"
            )


def _check_contradictions(rows: Sequence[Row]) -> None:
    first: dict[object, Row] = {}
    for row in rows:
        other = first.setdefault(row.prompt, row)
        if other.category != row.category:
            raise ConfigError(
                f"{row.origin}: the prompt stands at {other.origin} too, where it is "
                f"{_called(other)}, and here {_called(row)}; a prompt has one category"
            )


def _called(row: Row) -> str:
    return "to be answered" if row.category is None else f"of the category {row.category!r}"


def _check_counts(rows: Sequence[Row], names: Sequence[str], where: str) -> None:
    found = [row.category for row in rows]
    if not any(found):
        raise ConfigError(
            f"{where}: all {len(rows)} prompts are to be answered; a calibration needs "
            f"{LEAST_PROMPTS} of each category: {', '.join(names)}"
        )
    counts = {name: found.count(name) for name in names}
    if empty := [name for name, count in counts.items() if not count]:
        raise ConfigError(
            f"{where}: no prompt is of the category {empty[0]!r}; of each category "
            f"{LEAST_PROMPTS} are needed"
        )
    if few := [(count, name) for name, count in counts.items() if count < LEAST_PROMPTS]:
        count, name = min(few)
        raise ConfigError(
            f"{where}: {count} prompts of the category {name!r} are too few: {LEAST_PROMPTS} of "
            f"each category are needed, and 400 for a rate within 5 points"
        )
