"""Reports: an answer's decision, and the effect of its dials on all traffic.

A report is JSON: it is made anew for every choice, and validating our own numbers costs more than
computing them.
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict

from models.controls import Controls, refused_by_own_rule, sensitivity_of_bias
from models.solver import Interval, Solution, Target
from server.dials.floors import Side


class ExpectedReport(TypedDict):
    """The effect of a category's dial on traffic like the calibration's. Intervals are of 95 %.

    Attributes:
        refusal_rate: Share of the category's own prompts refused, by any category's token.
        false_refusal_rate: Share of benign prompts that the category's own rule refuses; None if
            the calibration has no benign prompts.
        asked: The dial, if it is a rate or a bound: ``{"rate": 0.3}``.
        reachable: Whether the dial is met.
    """

    refusal_rate: float
    refusal_rate_interval: Interval
    false_refusal_rate: float | None
    false_refusal_rate_interval: Interval | None
    asked: dict[str, float] | None
    reachable: bool


class TotalReport(TypedDict):
    """The effect of all dials together on benign prompts. The interval is of 95 %.

    Attributes:
        false_refusal_rate: Share of benign prompts refused, by any category's token.
        asked: The bound of ``refusal.false_refusal_rate``.
    """

    false_refusal_rate: float | None
    false_refusal_rate_interval: Interval | None
    asked: float | None


class DecisionReport(TypedDict):
    """One category's part in a decision.

    Attributes:
        probability: The model's own p_c / (p_c + p_respond), before the bias.
        margin: The model's own log-odds, ``z_c - z_respond``. Margin and probability are None if a
            broken checkpoint gives no finite number.
        bias: ``never`` and ``always`` are the infinities.
        refused: Whether this category's own rule, ``margin + bias >= 0``, refuses.
        expected: What the calibration expects of the bias; absent without a calibration.
        clamped: The policy's bound that the bias was moved to; absent if it was not moved.
    """

    probability: float | None
    margin: float | None
    bias: float | Literal["never", "always"]
    refused: bool
    expected: NotRequired[ExpectedReport]
    clamped: NotRequired[Side]


class RefusalReport(TypedDict):
    """What ``report`` adds to a choice.

    Attributes:
        category: The category that is refused; None for an answer.
        decisions: By category.
        calibration: The name of the calibration behind ``expected``; absent without one.
        expected: Absent without a calibration.
        replaced_decision: The requested rule, if the policy's floors replaced it by greedy; absent
            otherwise.
        would_refuse: In shadow mode, the category that the policy would have refused, or None;
            absent otherwise.
    """

    refused: bool
    category: str | None
    decisions: dict[str, DecisionReport]
    calibration: NotRequired[str]
    expected: NotRequired[TotalReport]
    replaced_decision: NotRequired[str]
    would_refuse: NotRequired[str | None]


class Forecast(NamedTuple):
    """What a calibration expects of one request's dials; the same in all its reports."""

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
    """Returns a solution in the form of a report.

    Args:
        calibration: The calibration's name.
        targets: The request's, in manifest order.
        total: The request's bound of all false refusals together.
        clamped: Indices of the categories that were moved to a policy's bound.
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
        category: The category that is refused; None for an answer.
        margins: fp32 log-odds, in manifest order.
        clamped: The bound that a category's dial was moved to, by category.
        replaced_decision: The requested rule, if it was replaced.
    """
    own = refused_by_own_rule(margins, controls.bias)
    decisions: dict[str, DecisionReport] = {
        name: DecisionReport(
            # Both are the sigmoid of log-odds.
            probability=sensitivity_of_bias(margin) if math.isfinite(margin) else None,
            margin=margin if math.isfinite(margin) else None,
            bias=_json_bias(bias),
            refused=refused,
        )
        for name, margin, bias, refused in zip(names, margins, controls.bias, own, strict=True)
    }
    report: RefusalReport = {
        "refused": category is not None,
        "category": category,
        "decisions": decisions,
    }
    if predicted is not None:
        report["calibration"] = predicted.calibration
        report["expected"] = predicted.total
        for decision, expected in zip(decisions.values(), predicted.categories, strict=True):
            decision["expected"] = expected
    for name, side in (clamped or {}).items():
        decisions[name]["clamped"] = side
    if replaced_decision is not None:
        report["replaced_decision"] = replaced_decision
    return report


def _json_bias(bias: float) -> float | Literal["never", "always"]:
    if bias == -math.inf:
        return "never"
    return "always" if bias == math.inf else bias
