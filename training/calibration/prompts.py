"""Prompts with known categories, which a calibration is made of."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.calibration import LEAST_PROMPTS
from models.errors import ConfigError
from training.config.data import Source
from training.data.rows import Row, with_one_category
from training.data.sources import draw_rows, identify


@dataclass(frozen=True)
class Prompts:
    """Prompts with known categories.

    Attributes:
        limit: At most so many, drawn at random; None for all.
    """

    sources: tuple[Source, ...]
    limit: int | None = None
    seed: int = 0


def read_prompts(
    prompts: Prompts, names: Sequence[str], say: Callable[[str], object] = print
) -> list[Row]:
    """Reads prompts and checks that they can make a calibration.

    A checkpoint of one category takes every refusal as of that category, as in training.

    Raises:
        ConfigError: A row is wrong, a prompt has two categories, a label is mapped to an unknown
            one, or a category has too few prompts.
    """
    known = known_categories(names)
    for source in prompts.sources:
        _check_labels(source, known)
    rows = draw_rows(
        [without_responses(source) for source in prompts.sources],
        known,
        limit=prompts.limit,
        seed=prompts.seed,
        say=say,
    )
    if len(names) == 1:
        rows = [with_one_category(row, names[0]) for row in rows]
    _check_contradictions(rows)
    where = ", ".join(source.name for source in prompts.sources)
    if prompts.limit is not None:
        where += f" (with --limit {prompts.limit})"
    _check_counts(rows, names, where)
    return rows


def known_categories(names: Sequence[str]) -> Collection[str]:
    """Returns the categories that rows may have: any, where there is one name or none."""
    return names if len(names) > 1 else _Everything()


def without_responses(source: Source) -> Source:
    """Returns the source without its column of responses: what to say is not asked for."""
    return source.model_copy(update={"columns": {**source.columns, "response": None}})


def repeated(rows: Sequence[Row]) -> int:
    """Returns how many prompts say what an earlier one says."""
    return len(rows) - len({row.prompt for row in rows})


def identified(prompts: Prompts) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name, by its path where two have one name."""
    found: dict[str, str] = {}
    for source in prompts.sources:
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


def _check_labels(source: Source, known: Collection[str]) -> None:
    for text, name in source.categories.items():
        if name is not None and name not in known:
            raise ConfigError(
                f"{source.name}: categories: {{{text}: {name}}}: {name!r} is none of the "
                f"checkpoint's categories, {', '.join(known)}"
            )


def _check_contradictions(rows: Sequence[Row]) -> None:
    first: dict[object, Row] = {}
    for row in rows:
        other = first.setdefault(row.prompt, row)
        if other.category != row.category:
            raise ConfigError(
                f"{row.origin}: the prompt is {_called(row)} here and {_called(other)} at "
                f"{other.origin}; a prompt has one category"
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
