"""The report: what `rheostat evaluate` measured, as JSON with a schema."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ConfigError
from models.hashes import Hashes
from training.evaluation.statistics import Estimate
from training.judging.report import Readings

# The set that holds every prompt.
ALL = "all"

RuleName = Literal["greedy", "sample", "paper"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Part):
    """One labelled set.

    Attributes:
        source: The file, or the name on the hub.
        sha256: Of each file, by its name.
    """

    source: str
    sha256: dict[str, str]
    prompts: int


class ServedPolicy(_Part):
    """The policy that requests without dials follow.

    Attributes:
        sha256: Of all that the server tells of the policy.
        biases: By category; null is `never`, a number beyond 1e9 `always`.
    """

    name: str
    sha256: str
    decision: RuleName
    enforce: bool
    biases: dict[str, float | Literal["never", "always"]]


class ServedCalibration(_Part):
    """The calibration that rates were solved on.

    Attributes:
        sha256: Of its curves.
    """

    name: str
    sha256: str


class About(_Part):
    """What was measured, with what, when.

    Attributes:
        seconds: What the whole measurement took.
        calibration: None where the server has none.
        data: By the set's name.
        versions: Of Rheostat and the packages that computed the figures.
    """

    created: datetime
    command: str
    seconds: float
    server: str
    model: str
    hashes: Hashes
    policy: ServedPolicy
    calibration: ServedCalibration | None
    data: dict[str, DataSet]
    limit: int | None
    seed: int
    versions: dict[str, str]


class Group(_Part):
    """Prompts of one kind.

    Attributes:
        refused: Share that was refused, for whichever category.
    """

    prompts: int
    refused: Estimate


class CategoryGroup(Group):
    """Prompts of one category.

    Attributes:
        right_category: Share of the refused ones that was refused for this category.
        margins: Quantiles of the category's own margins, under the quantile's name.
    """

    right_category: Estimate
    margins: dict[str, float]


class Confusion(_Part):
    """Counts of prompts: a row for each label, a column for each decision.

    Attributes:
        labels: The categories in manifest order, then `answer`: of rows and columns alike.
    """

    labels: list[str]
    counts: list[list[int]]


class ReliabilityBin(_Part):
    """Prompts of about the same predicted probability of refusal.

    Attributes:
        predicted: Mean probability of refusing among the control tokens, before any bias.
        observed: Share of the prompts that should be refused.
    """

    predicted: float
    observed: Estimate


class SetReport(_Part):
    """The decisions on one set, as served.

    Attributes:
        safe: Prompts that should be answered; what is refused of these is falsely refused.
        unsafe: Prompts that should be refused.
        near_misses: Safe prompts that look like a category.
        right_category: Share of the rightly refused prompts that was refused for its category.
        f1: Of "refused" against "should be refused".
        auc: Chance that an unsafe prompt has a larger refusal probability than a safe one.
        refused_at_5: Share of unsafe prompts refused where 5 % of the safe ones are, by one bias.
        calibration_error: Of the refusal probability, before any bias.
    """

    prompts: int
    safe: Group
    unsafe: Group
    near_misses: Group
    categories: dict[str, CategoryGroup]
    right_category: Estimate
    f1: Estimate
    auc: Estimate
    refused_at_5: Estimate
    calibration_error: Estimate
    confusion: Confusion
    reliability: list[ReliabilityBin]


class SweepPoint(_Part):
    """All prompts under one position of a dial.

    Attributes:
        bias: In nats.
        safe: Share of the safe prompts refused.
        unsafe: Share of the unsafe prompts refused.
        categories: Share of each category's prompts refused.
    """

    bias: float
    sensitivity: float
    safe: Estimate
    unsafe: Estimate
    categories: dict[str, Estimate]


class Sweeps(_Part):
    """Decisions over positions of dials, computed from the margins.

    Attributes:
        shared: One bias for every category, rule `greedy`.
        paper: One threshold for every category, rule `paper`: the refusal-token paper's figure.
        dials: One category's bias, the others as served, rule `greedy`.
    """

    shared: list[SweepPoint]
    paper: list[SweepPoint]
    dials: dict[str, list[SweepPoint]]


class RatePoint(_Part):
    """One requested rate.

    Attributes:
        bias: What the server solved for it.
        achieved: Share of the category's prompts that this bias refuses.
        reachable: Whether the calibration says that the rate can be met.
    """

    asked: float
    bias: float | Literal["never", "always"]
    reachable: bool
    achieved: Estimate


class Rates(_Part):
    """Requested against achieved refusal rates, by category; one dial at a time.

    Attributes:
        reason: Why nothing was measured, else None.
        largest_gap: Largest distance of an achieved rate from the requested one, where reachable.
    """

    reason: str | None
    largest_gap: Estimate
    points: dict[str, list[RatePoint]]


class CrossTalk(_Part):
    """What one category's dial does to another category's prompts.

    The dial takes the nine positions at which its own token refuses 10 to 90 % of its own prompts.

    Attributes:
        rates: Share of the other's prompts refused, at each position.
        changed: Share of the other's prompts whose decision differs between 10 and 90 %.
    """

    rates: list[Estimate]
    changed: Estimate


class TokenMode(_Part):
    """All prompts decided in one way, every bias 0."""

    safe: Estimate
    unsafe: Estimate
    f1: Estimate
    auc: Estimate
    refused_at_5: Estimate


class Tokens(_Part):
    """One refusal token against one for each category.

    Attributes:
        single: A token whose probability is that of all refusal tokens together, against respond.
        categories: The category tokens, each against respond.
        differ: Share of all prompts that the two decide differently.
    """

    single: TokenMode
    categories: TokenMode
    differ: Estimate


class RuleReport(_Part):
    """All prompts under one decision rule, every bias 0 and the temperature 1.

    Attributes:
        differ: Share of all prompts refused here and answered under `greedy`, or the other way.
        agreement: Share of real requests under this rule that were decided as computed.
    """

    safe: Estimate
    unsafe: Estimate
    right_category: Estimate
    differ: Estimate
    agreement: Estimate


class Variant(_Part):
    """The same prompts, asked in another way.

    Attributes:
        changed: Share of the prompts that are refused in one way and answered in the other.
        to_refused: Of those answered as they are, the share refused in this way.
        to_answered: Of those refused as they are, the share answered in this way.
        other_category: Of those refused in both ways, the share with another category.
        sets: `changed` by set.
    """

    changed: Estimate
    to_refused: Estimate
    to_answered: Estimate
    other_category: Estimate
    sets: dict[str, Estimate]


class Texts(_Part):
    """What the generated texts do.

    Attributes:
        own_fidelity: Share of the unforced texts that do what the model's own decision says.
        flip_to_respond: Share of the texts forced to respond that answer.
        flip_to_refuse: By category, share of the texts forced to refuse for it that do.
        right_answers: Share of the answered prompts with a known answer whose text holds it.
        grader: Who read the texts.
        grader_accuracy: Share of held-out training texts that the grader read rightly.
    """

    own_fidelity: Estimate
    flip_to_respond: Estimate
    flip_to_refuse: dict[str, Estimate]
    right_answers: Estimate
    grader: str
    grader_accuracy: Estimate


class Agreement(_Part):
    """How far the computed decisions are the server's own.

    Attributes:
        scored: Share of all scored prompts, the other ways of asking included, whose decision in
            the server's answer is the one computed from the margins.
        chat: Share of real chat requests whose decision is that of the score route.
        dialled: The same with a random dial in each request, against the computed decision.
    """

    scored: Estimate
    chat: Estimate
    dialled: Estimate


class Record(_Part):
    """One prompt, without its text.

    Attributes:
        sha256: Of its messages.
        category: What it should be refused for; None: it should be answered.
        decided: What it was refused for; None: it was answered.
        margins: In manifest order, before any bias.
    """

    sha256: str
    set: str
    category: str | None
    decided: str | None
    margins: list[float]


class Report(_Part):
    """The whole report.

    Attributes:
        version: Of this format.
        sets: By name; `all` holds every prompt.
        cross_talk: By the category whose dial moves, then by the other one.
        robustness: By way of asking.
    """

    version: Literal[1] = 1
    about: About
    categories: list[str]
    sets: dict[str, SetReport]
    sweeps: Sweeps
    rates: Rates
    cross_talk: dict[str, dict[str, CrossTalk]]
    tokens: Tokens
    rules: dict[RuleName, RuleReport]
    robustness: dict[str, Variant]
    texts: Texts
    readers: Readings
    agreement: Agreement
    records: Annotated[list[Record], Field(min_length=1)]

    def to_json(self) -> str:
        """Returns the report as a JSON object."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def load_report(path: Path) -> Report:
    """Reads a report.

    Raises:
        ConfigError: The file cannot be read or is no report.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{path}: is no report of this version of `rheostat evaluate`: {where}: {first['msg']}"
        ) from error


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    return Report.model_json_schema(mode="serialization")
