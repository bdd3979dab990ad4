"""The training configuration's losses: one flexible loss for the decision, one for the text."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, Tag, model_validator

from models.manifest import Name
from training.config.fields import Frozen

AUTO = "auto"
# What pydantic puts into the place of a mistake, beside the names of the fields.
FORMS = ("number", "schedule", "category")

Q = Annotated[float, Field(ge=-1, le=2)]
Gamma = Annotated[float, Field(ge=0, le=5)]


class QSchedule(Frozen):
    """q moves evenly from `start` to `end` over the first share `over` of the steps, then stays."""

    start: Q
    end: Q
    over: Annotated[float, Field(gt=0, le=1)] = 1.0


class GammaSchedule(Frozen):
    """gamma moves as in `QSchedule`."""

    start: Gamma
    end: Gamma
    over: Annotated[float, Field(gt=0, le=1)] = 1.0


def _kind(value: object) -> str | None:
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, QSchedule | GammaSchedule):
        return "schedule"
    if isinstance(value, Mapping):
        return "schedule" if {"start", "end", "over"} & set(value) else "category"
    return AUTO if value == AUTO else None


def _by_kind(forms: str) -> Discriminator:
    # A plain union would tell, for one wrong number, what is wrong with it as each of the others.
    return Discriminator(
        _kind, custom_error_type="loss_parameter", custom_error_message=f"must be {forms}"
    )


_TEXT_FORMS = _by_kind("a number or a schedule with start, end and over")
_DECISION_FORMS = _by_kind(
    "a number, a schedule with start, end and over, a number for each category, or auto"
)


class TextLoss(Frozen):
    """Loss of the tokens after the decision.

    Attributes:
        q: See loss/flexible.py; 0 with gamma 0 is cross-entropy. A number or a schedule.
        gamma: As `q`.
        weight: Of each token.
    """

    q: Annotated[
        Annotated[Q, Tag("number")] | Annotated[QSchedule, Tag("schedule")], _TEXT_FORMS
    ] = 0.0
    gamma: Annotated[
        Annotated[Gamma, Tag("number")] | Annotated[GammaSchedule, Tag("schedule")], _TEXT_FORMS
    ] = 0.0
    weight: NonNegativeFloat = 1.0


class DecisionLoss(Frozen):
    """Loss of the control tokens.

    Attributes:
        q: A number, a schedule, a number by category (`respond` for the answers; what is not named
            has 0), or `auto`: chosen from the training data alone, before the training.
        gamma: As `q`. If one is `auto`, both are; the other may be left out.
        weight: Of each control token.
        pair_weight: The same in the rows of a counterfactual pair, where one prompt comes both
            refused and answered: they teach the text that follows a token, and their control tokens
            are noise to the decision.
    """

    q: Annotated[
        Annotated[Q, Tag("number")]
        | Annotated[QSchedule, Tag("schedule")]
        | Annotated[dict[Name, Q], Tag("category")]
        | Annotated[Literal["auto"], Tag("auto")],
        _DECISION_FORMS,
    ] = 0.0
    gamma: Annotated[
        Annotated[Gamma, Tag("number")]
        | Annotated[GammaSchedule, Tag("schedule")]
        | Annotated[dict[Name, Gamma], Tag("category")]
        | Annotated[Literal["auto"], Tag("auto")],
        _DECISION_FORMS,
    ] = 0.0
    weight: PositiveFloat = 10.0
    pair_weight: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _both_or_none_chosen(cls, values: Any) -> Any:
        if not isinstance(values, dict) or AUTO not in (values.get("q"), values.get("gamma")):
            return values
        for name in ("q", "gamma"):
            if values.get(name, AUTO) != AUTO:
                raise ValueError(
                    f"auto chooses q and gamma together; make {name} auto too, or leave it out"
                )
        return {**values, "q": AUTO, "gamma": AUTO}


class LossConfig(Frozen):
    """What is minimised: the weighted mean of the tokens' losses."""

    decision: DecisionLoss = DecisionLoss()
    text: TextLoss = TextLoss()
