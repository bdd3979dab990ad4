"""The ``refusal`` object of a request."""

import math
import reprlib
import sys
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from models.controls import bias_of_sensitivity
from models.errors import RequestError, shortened
from models.manifest import Name
from models.solver import Target

WORDS = {"never": -math.inf, "default": 0.0, "always": math.inf}
FIELD = "refusal"
HEADER = "x-refusal"
POLICY_HEADER = "x-refusal-policy"
_MOST_NUMBER = int(sys.float_info.max)


def _finite_number(value: Any, what: str) -> float:
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST_NUMBER:
        return float(value)
    raise ValueError(f"{what} must be a finite number, got {reprlib.repr(value)}")


def _sensitivity(value: Any) -> Target:
    return Target(bias=bias_of_sensitivity(_finite_number(value, "a sensitivity")))


def _bias(value: Any) -> Target:
    return Target(bias=_finite_number(value, "a bias"))


def _rate(value: Any) -> Target:
    return Target(rate=_finite_number(value, "a rate"))


def _false_refusal_rate(value: Any) -> Target:
    return Target(false_refusal_rate=_finite_number(value, "a false refusal rate"))


def _total_bound(value: Any) -> float:
    bound = _finite_number(value, "a false refusal rate")
    Target(false_refusal_rate=bound)  # the same range
    return bound


_OBJECT_FORMS = {
    "sensitivity": _sensitivity,
    "bias": _bias,
    "rate": _rate,
    "false_refusal_rate": _false_refusal_rate,
}


def parse_dial(value: Any) -> Target:
    """Returns one category's target.

    Args:
        value: A sensitivity within 0..1; one of the words ``never``, ``default``, ``always``;
            or an object with exactly one of ``sensitivity``, ``bias``, ``rate`` and
            ``false_refusal_rate``.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, str):
        if value not in WORDS:
            raise ValueError(f"{reprlib.repr(value)} is no dial; the words are {', '.join(WORDS)}")
        return Target(bias=WORDS[value])
    if not isinstance(value, dict):
        return _sensitivity(value)
    for form, number in value.items():
        if len(value) == 1 and form in _OBJECT_FORMS:
            return _OBJECT_FORMS[form](number)
    raise ValueError(
        f"a dial object holds exactly one of {', '.join(_OBJECT_FORMS)}, "
        f"got {reprlib.repr(list(value))}"
    )


_NUMBER = {"type": "number"}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
Dial = Annotated[
    Target,
    BeforeValidator(parse_dial),
    WithJsonSchema(
        {
            "anyOf": [
                _SHARE,
                {"enum": list(WORDS)},
                {
                    "type": "object",
                    "properties": {
                        "sensitivity": _SHARE,
                        "bias": _NUMBER,
                        "rate": _SHARE,
                        "false_refusal_rate": {**_SHARE, "exclusiveMaximum": 1},
                    },
                    "additionalProperties": False,
                    "minProperties": 1,
                    "maxProperties": 1,
                },
            ]
        }
    ),
]


REFUSAL_ONLY = ("refusal",)
REFUSAL_AND_CONTENT = ("refusal", "content")


def _refusal_in(value: Any) -> tuple[str, ...]:
    for places in (REFUSAL_ONLY, REFUSAL_AND_CONTENT):
        if isinstance(value, list | tuple) and list(value) == list(places):
            return places
    raise ValueError('must be ["refusal"] or ["refusal", "content"]')


RefusalIn = Annotated[
    tuple[str, ...],
    BeforeValidator(_refusal_in),
    WithJsonSchema({"enum": [list(REFUSAL_ONLY), list(REFUSAL_AND_CONTENT)]}),
]


class DialOptions(BaseModel):
    """The fields of a ``refusal`` object that an operator may set for all requests.

    Attributes:
        decision: How the control token is chosen.
        report: Whether each choice has a ``refusal_report``.
        refusal_in: The fields of a chat message that hold a refusal's text.
        categories: ``parse_dial`` reads each dial.
        false_refusal_rate: Upper bound, with 95 % confidence, of the share of benign prompts
            refused by any category.
        calibration: Name of the calibration that rates are solved on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    decision: Literal["greedy", "sample", "paper"] | None = None
    report: bool | None = None
    refusal_in: RefusalIn | None = None
    categories: dict[str, Dial] = {}
    false_refusal_rate: Annotated[float, BeforeValidator(_total_bound)] | None = None
    calibration: Name | None = None

    @property
    def solves(self) -> bool:
        """Whether a dial is a rate or a bound, for which a calibration is solved."""
        biases = [target.bias for target in self.categories.values()]
        return self.false_refusal_rate is not None or None in biases

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, value: Any) -> Any:
        if not isinstance(value, dict | DialOptions):
            raise ValueError(f"must be an object, got {type(value).__name__}")
        return value


class RefusalOptions(DialOptions):
    """The top-level ``refusal`` object of a request.

    Attributes:
        policy: One of the caller's policies; None means the caller's default.
    """

    # Any text, so that the error is the same for all unknown names.
    policy: str | None = None

    def __hash__(self) -> int:
        return hash((frozenset(self.categories.items()), self.decision, self.calibration))

    @property
    def moves_dials(self) -> bool:
        """Whether the request itself sets anything that decides."""
        others = (self.decision, self.false_refusal_rate, self.calibration)
        return bool(self.categories) or others != (None, None, None)


def check_refusal_in(options: RefusalOptions) -> None:
    """Validates the options of a route whose answers are no chat messages.

    Raises:
        RequestError: They ask for a refusal's text in a message's ``content``.
    """
    if options.refusal_in == REFUSAL_AND_CONTENT:
        path = f"{FIELD}.refusal_in"
        raise RequestError(f"{path}: only chat messages have a content", param=path)


def parse_header(text: str) -> dict[str, Any]:
    """Reads the header form, ``safety=0.9, humanizing=never, unsupported=rate:0.3``.

    Returns:
        The ``refusal`` object that says the same; its values are not validated yet.

    Raises:
        RequestError: The syntax is wrong, or a category is duplicate.
    """
    categories: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, dial = (part.strip() for part in item.partition("="))
        if not (name and equals and dial) or name in categories:
            raise RequestError(
                f"X-Refusal: {reprlib.repr(item.strip())} is not one category=dial, each category "
                "once; write them like safety=0.9, humanizing=never, unsupported=rate:0.3",
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
        RequestError: A field is wrong; the error has its path.
    """
    try:
        return RefusalOptions.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([FIELD, *(shortened(str(part)) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(RefusalOptions.model_fields)
            raise RequestError(f"{path}: unknown field; known are {known}", param=path) from error
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{path}: {message}", param=path) from error
