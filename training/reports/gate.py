"""Bounds that a report must keep: `xstest.safe.refused <= 0.20`."""

import operator
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from models.errors import ConfigError
from models.files import parse_yaml
from training.evaluation.report import Report
from training.evaluation.statistics import Estimate
from training.reports.summary import lookup

BOUND = re.compile(r"\s*([\w.-]+?)\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
EXIT_STATUS = {"kept": 0, "broken": 3, "not measured": 4}

Verdict = Literal["kept", "broken", "not measured"]


class Bound(NamedTuple):
    """One line of a gate file."""

    path: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.path} {self.sign} {self.limit:g}"


class Outcome(NamedTuple):
    """A bound and what the report says of it.

    Attributes:
        told: The figure with its interval, or why there is none.
    """

    bound: Bound
    verdict: Verdict
    told: str


def read_bounds(path: Path, sets: Collection[str]) -> list[Bound]:
    """Reads a gate file: a YAML list of bounds.

    Args:
        sets: The names of the sets that are measured.

    Raises:
        ConfigError: A line is no bound, or names no figure of a report.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    lines = parse_yaml(text, str(path))
    if not isinstance(lines, list) or not lines:
        raise ConfigError(f"{path}: must be a list of bounds such as `- all.safe.refused <= 0.20`")
    return [_bound(f"{path}: {line!r}", line, sets) for line in lines]


def check(report: Report, bounds: Sequence[Bound]) -> list[Outcome]:
    """Compares a report with bounds."""
    return [_outcome(report, bound) for bound in bounds]


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Returns 3 where a bound is broken, else 4 where one could not be measured, else 0."""
    verdicts = {outcome.verdict for outcome in outcomes}
    return next((EXIT_STATUS[v] for v in ("broken", "not measured") if v in verdicts), 0)


def gate_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns the outcomes as a table for the terminal."""
    table = Table("bound", "verdict", "measured", title="gate")
    for outcome in outcomes:
        table.add_row(*map(Text, (str(outcome.bound), outcome.verdict, outcome.told)))
    return table


def _bound(where: str, line: object, sets: Collection[str]) -> Bound:
    found = BOUND.fullmatch(line) if isinstance(line, str) else None
    if found is None:
        raise ConfigError(f"{where}: must read PATH <= NUMBER, with <=, >=, < or >")
    _check_path(where, found[1].split("."), sets)
    return Bound(found[1], found[2], float(found[3]))


def _check_path(where: str, parts: list[str], sets: Collection[str]) -> None:
    kind: Any = Report
    for part in ["sets", *parts] if parts[0] in sets else parts:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        fields = kind.model_fields if _is_model(kind) else {}
        if part not in fields:
            known = [*fields, *(sets if kind is Report else ())]
            raise ConfigError(f"{where}: {part!r} is none of {', '.join(known) or 'its fields'}")
        kind = fields[part].annotation
    numbers = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if kind is not Estimate and not {int, float} & set(numbers):
        raise ConfigError(f"{where}: is no figure; its fields are {', '.join(_fields(kind))}")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(kind: Any) -> list[str]:
    return list(kind.model_fields) if _is_model(kind) else ["those of its entries"]


def _outcome(report: Report, bound: Bound) -> Outcome:
    try:
        found = lookup(report, bound.path)
    except KeyError as error:
        return Outcome(bound, "not measured", str(error.args[0]))
    value = found.value if isinstance(found, Estimate) else found
    if value is None:
        reason = found.reason if isinstance(found, Estimate) else None
        return Outcome(bound, "not measured", reason or "the report has no value")
    kept = COMPARE[bound.sign](value, bound.limit)
    return Outcome(bound, "kept" if kept else "broken", _told(found))


def _told(found: Estimate | float) -> str:
    if not isinstance(found, Estimate):
        return f"{found:g}"
    return f"{found.value:.4g} ({found.low:.4g} to {found.high:.4g}), n = {found.n}"
