"""The ``refusal`` object of a request, and what an answer says about its decision."""

import contextlib
import math
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)

from models.controls import Controls, Rule, bias_of_sensitivity, refused_by_own_rule
from models.errors import RequestError

WORDS = {"never": -math.inf, "default": 0.0, "always": math.inf}
FIELD = "refusal"
HEADER = "x-refusal"


def _finite_number(value: Any, what: str) -> float:
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the largest float
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, got {reprlib.repr(value)}")
    return number


def _sensitivity(value: Any) -> float:
    return bias_of_sensitivity(_finite_number(value, "a sensitivity"))


def _bias(value: Any) -> float:
    return _finite_number(value, "a bias")


_OBJECT_FORMS = {"sensitivity": _sensitivity, "bias": _bias}


def parse_dial(value: Any) -> float:
    """Returns the bias that one category's dial asks for.

    Args:
        value: A sensitivity within 0..1; one of the words ``never``, ``default``, ``always``;
            or an object with exactly one of ``sensitivity`` and ``bias``.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, str):
        if value not in WORDS:
            raise ValueError(f"{reprlib.repr(value)} is no dial; the words are {', '.join(WORDS)}")
        return WORDS[value]
    if not isinstance(value, dict):
        return _sensitivity(value)
    if len(value) != 1 or not _OBJECT_FORMS.keys() >= value.keys():
        raise ValueError(
            f"a dial object holds exactly one of {', '.join(_OBJECT_FORMS)}, "
            f"got {reprlib.repr(list(value))}"
        )
    ((form, number),) = value.items()
    return _OBJECT_FORMS[form](number)


class RefusalOptions(BaseModel):
    """The top-level ``refusal`` object.

    Attributes:
        decision: How the control token is chosen.
        report: Whether each choice carries a ``refusal_report``.
        categories: Bias by category name; what a client writes is read by ``parse_dial``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    decision: Literal["greedy", "sample", "paper"] | None = None
    report: bool | None = None
    categories: dict[str, Annotated[float, BeforeValidator(parse_dial)]] = {}

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, value: Any) -> Any:
        if not isinstance(value, dict | RefusalOptions):
            raise ValueError(f"must be an object, got {type(value).__name__}")
        return value


class DecisionReport(BaseModel):
    """One category's part in a decision.

    Attributes:
        probability: The model's own p_c / (p_c + p_respond), before the bias.
        margin: The model's own log-odds, ``z_c - z_respond``.
        bias: What was added; ``never`` and ``always`` stand for the infinities.
        refused: Whether this category's own rule, ``margin + bias >= 0``, refuses.
    """

    probability: float
    margin: float
    bias: float | Literal["never", "always"]
    refused: bool


class RefusalReport(BaseModel):
    """What ``report`` adds to a choice."""

    refused: bool
    category: str | None
    decisions: dict[str, DecisionReport]


def parse_header(text: str) -> dict[str, Any]:
    """Reads the header form, ``safety=0.9, humanizing=never, incomplete=bias:-2``.

    Returns:
        The ``refusal`` object that says the same; its values are not validated yet.

    Raises:
        RequestError: It is not written like that, or names a category twice.
    """
    categories: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, dial = (part.strip() for part in item.partition("="))
        if not (name and equals and dial) or name in categories:
            raise RequestError(
                f"X-Refusal: {reprlib.repr(item.strip())} is not one category=dial, each category "
                "once; write them like safety=0.9, humanizing=never, incomplete=bias:-2",
                param="X-Refusal",
            )
        form, colon, number = (part.strip() for part in dial.partition(":"))
        categories[name] = {form: _number_or_text(number)} if colon else _number_or_text(dial)
    return {"categories": categories}


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def parse_options(value: Any) -> RefusalOptions:
    """Validates a ``refusal`` object.

    Raises:
        RequestError: With the path of the field that is wrong.
    """
    try:
        return RefusalOptions.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([FIELD, *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(RefusalOptions.model_fields)
            raise RequestError(f"{path}: unknown field; known are {known}", param=path) from error
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{path}: {message}", param=path) from error


def resolve_controls(
    options: RefusalOptions, defaults: RefusalOptions, names: Sequence[str]
) -> Controls:
    """Lays a request's dials over the defaults.

    Args:
        options: The request's.
        defaults: The operator's.
        names: The checkpoint's categories, in manifest order.

    Raises:
        RequestError: A category is not one of the checkpoint's.
    """
    dials = {**defaults.categories, **options.categories}
    for name in dials:
        if name not in names:
            raise RequestError(
                f"{FIELD}.categories.{name}: this checkpoint has no such category; it has "
                f"{', '.join(names)}",
                param=f"{FIELD}.categories.{name}",
            )
    rule = options.decision or defaults.decision or "greedy"
    return Controls(
        rule=Rule[rule.upper()],
        bias=tuple(dials.get(name, 0.0) for name in names),
        selected=tuple(name in dials for name in names),
    )


def build_report(
    names: Sequence[str], category: str | None, margins: Sequence[float], controls: Controls
) -> RefusalReport:
    """Builds the report of one choice.

    Args:
        names: The categories in manifest order.
        category: The category that was refused for, or None for an answer.
        margins: fp32 log-odds, one a category.
        controls: The request's effective dials.
    """
    own = refused_by_own_rule(margins, controls.bias)
    return RefusalReport(
        refused=category is not None,
        category=category,
        decisions={
            name: DecisionReport(
                probability=_sigmoid(margin), margin=margin, bias=_json_bias(bias), refused=refused
            )
            for name, margin, bias, refused in zip(names, margins, controls.bias, own, strict=True)
        },
    )


def _sigmoid(log_odds: float) -> float:
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    return math.exp(log_odds) / (1.0 + math.exp(log_odds))


def _json_bias(bias: float) -> float | Literal["never", "always"]:
    if bias == -math.inf:
        return "never"
    return "always" if bias == math.inf else bias
