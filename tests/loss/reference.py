"""The flexible loss and its two derivatives, one number at a time, with 120 digits.

Python's decimal knows exp and ln and nothing else of the family: the formula is differentiated by
hand below and written without any care for cancellation or overflow, which the digits and decimal's
huge exponents make unnecessary for |log_p| and |q·log_p| above 1e-50.
"""

from decimal import Decimal, localcontext
from typing import NamedTuple


class Exact(NamedTuple):
    """A number that is a sum.

    Attributes:
        value: The sum.
        size: The sum of the terms' absolute values: what an error has to be measured against
            where the terms cancel.
    """

    value: Decimal
    size: Decimal


def flexible(log_p: float, q: float, gamma: float) -> tuple[Exact, Exact, Exact]:
    """Returns value, first and second derivative by log_p; needs log_p < 0."""
    with localcontext() as context:
        context.prec = 120
        x, q_, g = Decimal(log_p), Decimal(q), Decimal(gamma)
        p = x.exp()
        log_rest = (1 - p).ln()

        def power(exponent: Decimal) -> Decimal:
            return (log_rest * exponent).exp()

        tail = -x if q == 0 else (1 - (q_ * x).exp()) / q_
        tail_1 = -(q_ * x).exp()
        tail_2 = q_ * tail_1
        weight = power(g)
        weight_1 = -g * p * power(g - 1)
        weight_2 = weight_1 + g * (g - 1) * p * p * power(g - 2)
        sums = (
            [weight * tail],
            [weight_1 * tail, weight * tail_1],
            [weight_2 * tail, 2 * weight_1 * tail_1, weight * tail_2],
        )
        first, second, third = (
            Exact(sum(s, Decimal(0)), sum(map(abs, s), Decimal(0))) for s in sums
        )
        return first, second, third
