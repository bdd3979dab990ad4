"""What the client reads of our own server's answers; other fields are not looked at."""

import math
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from models.hashes import Hashes


class Foreign(BaseModel):
    """One object of an answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Named(Foreign):
    """A category."""

    name: str


class ModelEntry(Foreign):
    """A served model."""

    id: str


def _as_number(bias: object) -> object:
    return {"never": -math.inf, "always": math.inf}[bias] if bias in ("never", "always") else bias


Bias = Annotated[float, BeforeValidator(_as_number)]


class Margin(Foreign):
    """One category in a scored prompt's decision."""

    margin: float | None
    bias: Bias = 0.0


class Score(Foreign):
    """A scored prompt."""

    index: int
    log_normaliser: float | None
    category: str | None = None
    decisions: dict[str, Margin]


class Expected(Foreign):
    """What a calibration expects of a category's dial."""

    reachable: bool


class ExpectedAll(Foreign):
    """What a calibration expects of a request."""

    categories: dict[str, Expected]


class Dial(Foreign):
    """A position of a dial."""

    bias: Bias


class PolicyDial(Foreign):
    """A policy's dial."""

    default: Dial


class PolicyPage(Foreign):
    """A policy."""

    name: str
    decision: str
    enforce: bool
    categories: dict[str, PolicyDial]


class Decision(Foreign):
    """One category in a chat answer's decision."""

    margin: float
    bias: Bias | None


class RefusalReport(Foreign):
    """The report of a choice."""

    refused: bool
    category: str | None
    decisions: dict[str, Decision]
    replaced_decision: str | None = None


class Said(Foreign):
    """A message."""

    content: str | None = None
    refusal: str | None = None


class Choice(Foreign):
    """A choice."""

    message: Said
    refusal_report: RefusalReport


class Chat(Foreign):
    """A chat answer."""

    choices: Annotated[tuple[Choice, ...], Field(min_length=1)]


Entry = TypeVar("Entry", bound=Foreign)
Page = TypeVar("Page", bound=Foreign)


class Listed(Foreign, Generic[Entry]):
    """A list."""

    data: tuple[Entry, ...]


class Identified(Listed[Named]):
    """The categories, and which checkpoint has them."""

    hashes: Hashes


class SolvedScore(Listed[Score]):
    """Scored prompts, and what to expect of the request's rates."""

    expected: ExpectedAll


class Anything(Foreign):
    """An object of which every field is kept."""

    model_config = ConfigDict(extra="allow", frozen=True)
