"""A category's curve: how many prompts each bias refuses, and how many benign ones."""

from dataclasses import dataclass

import numpy as np

from models.calibration import Calibration
from models.confidence import intervals
from models.controls import sensitivity_of_bias
from models.solver import Interval, threshold_rule


@dataclass(frozen=True)
class CurvePoint:
    """One point of a category's curve, the other categories as trained.

    Attributes:
        bias: Finite.
        sensitivity: 1 / (1 + exp(-bias)).
        rate: Share of the category's own prompts refused, by any token.
        rate_interval: Its 95 % interval.
        false_refusal_rate: Share of benign prompts that the category's own rule refuses.
        interval: Its 95 % interval.
    """

    bias: float
    sensitivity: float
    rate: float
    rate_interval: Interval
    false_refusal_rate: float | None
    interval: Interval | None


def curve(
    calibration: Calibration,
    category: str,
    points: int = 101,
) -> list[CurvePoint]:
    """Returns one category's curve, bias rising, the other categories as trained.

    Args:
        calibration: Its prompts are the sample of the traffic.
        category: Its name.
        points: How many, at least 2. One of them is as trained (bias 0).

    Raises:
        ValueError: The calibration does not know the category.
    """
    c = calibration.column(category)
    solver = threshold_rule(calibration)
    biases = np.linspace(*solver.span(c), points).astype(np.float32)
    biases[abs(biases).argmin()] = 0.0
    moved = np.zeros((points, len(calibration.names)))
    moved[:, c] = biases
    rates = np.array([solver.rate(c, row) for row in moved])
    n, benign = calibration.prompts[category], calibration.benign
    low, high = intervals(rates * n, n)
    false = np.array([solver.own_false(c, b) for b in moved[:, c]]) if benign else None
    false_low, false_high = intervals(false * benign, benign) if false is not None else (None, None)
    return [
        CurvePoint(
            bias=float(bias),
            sensitivity=sensitivity_of_bias(float(bias)),
            rate=float(rates[i]),
            rate_interval=(float(low[i]), float(high[i])),
            false_refusal_rate=None if false is None else float(false[i]),
            interval=(
                None
                if false_low is None or false_high is None
                else (float(false_low[i]), float(false_high[i]))
            ),
        )
        for i, bias in enumerate(biases)
    ]
