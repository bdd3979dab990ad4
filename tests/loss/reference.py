"""The flexible loss and its two derivatives, one number at a time, with 250 digits.

Python's decimal knows exp and ln and nothing else of the family: the formula is differentiated by
hand below and written without any care for cancellation, which 250 digits and an exponent without
bound make unnecessary.
"""

from decimal import Decimal, localcontext


def flexible(log_p: float, q: float, gamma: float) -> tuple[Decimal, Decimal, Decimal]:
    """Returns value, first and second derivative by log_p; needs log_p < 0."""
    with localcontext() as context:
        context.prec = 250
        x, q_, g = Decimal(log_p), Decimal(q), Decimal(gamma)
        p = x.exp()
        rest = 1 - p

        def power(exponent: Decimal) -> Decimal:
            return (rest.ln() * exponent).exp()

        tail = -x if q == 0 else (1 - (q_ * x).exp()) / q_
        tail_1 = -(q_ * x).exp()
        tail_2 = q_ * tail_1
        weight = power(g)
        weight_1 = -g * p * power(g - 1)
        weight_2 = weight_1 + g * (g - 1) * p * p * power(g - 2)
        return (
            weight * tail,
            weight_1 * tail + weight * tail_1,
            weight_2 * tail + 2 * weight_1 * tail_1 + weight * tail_2,
        )
