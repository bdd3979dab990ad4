"""What an answer says about its decision, and about what its dials do to all traffic."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from models.controls import Controls, refused_by_own_rule, sensitivity_of_bias
from models.solver import Interval, Solution, Target
from server.dials.floors import Side


class ExpectedReport(BaseModel):
    """What a category's dial does to traffic like the calibration's.

    Attributes:
        refusal_rate: Share of the category's own prompts refused, by whichever category's token.
        refusal_rate_interval: Its 95 % interval.
        false_refusal_rate: Share of benign prompts that the category's own rule refuses; none
            where the calibration has no benign prompts.
        false_refusal_rate_interval: Its 95 % interval.
        asked: The dial, where it was a rate: ``{"rate": 0.3}``.
        reachable: Whether what was asked for is met.
    """

    refusal_rate: float
    refusal_rate_interval: Interval
    false_refusal_rate: float | None
    false_refusal_rate_interval: Interval | None
    asked: dict[str, float] | None
    reachable: bool


class TotalReport(BaseModel):
    """What all dials together do to benign prompts.

    Attributes:
        false_refusal_rate: Share of benign prompts refused, by whichever category's token.
        false_refusal_rate_interval: Its 95 % interval.
        asked: The bound of ``refusal.false_refusal_rate``.
    """

    false_refusal_rate: float | None
    false_refusal_rate_interval: Interval | None
    asked: float | None


class DecisionReport(BaseModel):
    """One category's part in a decision.

    Attributes:
        probability: The model's own p_c / (p_c + p_respond), before the bias.
        margin: The model's own log-odds, ``z_c - z_respond``. Both are none where the checkpoint
            is so broken that it gives no finite number.
        bias: What was added; ``never`` and ``always`` stand for the infinities.
        refused: Whether this category's own rule, ``margin + bias >= 0``, refuses.
        expected: What the calibration says of the bias; absent without one.
        clamped: The bound of the request's policy that the bias was moved to, because less or more
            was asked for; absent where it was not.
    """

    probability: float | None
    margin: float | None
    bias: float | Literal["never", "always"]
    refused: bool
    expected: ExpectedReport | None = None
    clamped: Side | None = None


class RefusalReport(BaseModel):
    """What ``report`` adds to a choice.

    Attributes:
        refused: Whether the choice is a refusal.
        category: What for.
        decisions: By category.
        calibration: Name of the calibration that ``expected`` comes from; absent without one.
        expected: What all dials do together; absent without a calibration.
        replaced_decision: The rule that was asked for, where the policy's floors demand greedy;
            absent where it was followed.
        would_refuse: Under a policy that is not enforced, the category that it would have refused
            for, or none; absent under others.
    """

    refused: bool
    category: str | None
    decisions: dict[str, DecisionReport]
    calibration: str | None = None
    expected: TotalReport | None = None
    replaced_decision: str | None = None
    would_refuse: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what is sent: nothing of calibrations where there is none."""
        return self.model_dump(exclude_unset=True)


class Forecast(BaseModel):
    """What a calibration says of one request's dials; the same in all its reports.

    Attributes:
        calibration: Its name.
        categories: In manifest order.
        total: All dials together.
    """

    model_config = ConfigDict(frozen=True)

    calibration: str
    categories: tuple[ExpectedReport, ...]
    total: TotalReport


def forecast(
    calibration: str,
    solution: Solution,
    targets: Sequence[Target | None],
    total: float | None,
    clamped: Container[int] = (),
) -> Forecast:
    """Puts a solution into the words of a report.

    Args:
        calibration: The name of the calibration that was solved on.
        solution: What the solver found.
        targets: What was asked of each category, in manifest order.
        total: The bound of all categories together, where one was asked.
        clamped: Categories, by index, that got a policy's bound instead of what was asked.
    """
    return Forecast(
        calibration=calibration,
        categories=tuple(
            ExpectedReport(
                refusal_rate=expected.rate,
                refusal_rate_interval=expected.rate_interval,
                false_refusal_rate=expected.false_refusal_rate,
                false_refusal_rate_interval=expected.false_refusal_interval,
                asked=_asked(target),
                reachable=expected.reachable and c not in clamped,
            )
            for c, (expected, target) in enumerate(zip(solution.expected, targets, strict=True))
        ),
        total=TotalReport(
            false_refusal_rate=solution.total_false_refusal_rate,
            false_refusal_rate_interval=solution.total_false_refusal_interval,
            asked=total,
        ),
    )


def _asked(target: Target | None) -> dict[str, float] | None:
    if target is None or target.bias is not None:
        return None
    if target.rate is not None:
        return {"rate": target.rate}
    assert target.false_refusal_rate is not None
    return {"false_refusal_rate": target.false_refusal_rate}


def build_report(
    names: Sequence[str],
    category: str | None,
    margins: Sequence[float],
    controls: Controls,
    predicted: Forecast | None = None,
    clamped: Mapping[str, Side] | None = None,
    replaced_decision: str | None = None,
) -> RefusalReport:
    """Builds the report of one choice.

    Args:
        names: The categories in manifest order.
        category: The category that was refused for, or None for an answer.
        margins: fp32 log-odds, one a category.
        controls: The request's effective dials.
        predicted: What a calibration says of them.
        clamped: Categories whose dial was moved to a bound of the policy's, with the bound.
        replaced_decision: The rule that was asked for, where it was not followed.
    """
    own = refused_by_own_rule(margins, controls.bias)
    decisions = {
        name: DecisionReport(
            # Both are the sigmoid of log-odds.
            probability=sensitivity_of_bias(margin) if math.isfinite(margin) else None,
            margin=margin if math.isfinite(margin) else None,
            bias=_json_bias(bias),
            refused=refused,
        )
        for name, margin, bias, refused in zip(names, margins, controls.bias, own, strict=True)
    }
    report = RefusalReport(refused=category is not None, category=category, decisions=decisions)
    if predicted is not None:
        report.calibration = predicted.calibration
        report.expected = predicted.total
        for decision, expected in zip(decisions.values(), predicted.categories, strict=True):
            decision.expected = expected
    for name, side in (clamped or {}).items():
        decisions[name].clamped = side
    if replaced_decision is not None:
        report.replaced_decision = replaced_decision
    return report


def _json_bias(bias: float) -> float | Literal["never", "always"]:
    if bias == -math.inf:
        return "never"
    return "always" if bias == math.inf else bias
