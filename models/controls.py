"""The controls of one request's decision, and their form on the way to the worker."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NotRequired, TypedDict

# The controls' key in vLLM's ``SamplingParams.extra_args``.
EXTRA_ARGS_KEY = "rheostat"


class Rule(IntEnum):
    """How the biased logits become one token.

    Source: ``PAPER`` is the released rule of arXiv 2412.06748; the other two are ours.
    """

    GREEDY = 0
    SAMPLE = 1
    PAPER = 2


class WireControls(TypedDict):
    """``Controls`` on their way to the worker.

    Attributes:
        rule: A ``Rule``.
        row: The fp32 bytes of ``dial_row``, with nothing drawn yet.
        ticket: Where to write the margins, a ``Ticket`` of server/generation/margins.py; absent
            unless they are wanted.
    """

    rule: int
    row: bytes
    ticket: NotRequired[tuple[str, int, int]]


@dataclass(frozen=True)
class Controls:
    """The effective dials of one request, one entry a category in manifest order.

    Attributes:
        rule: How the token is chosen.
        bias: Added to each refusal logit; ``-inf`` never, ``+inf`` always.
        selected: Whether the request or its defaults named the category; only ``PAPER`` reads it.
    """

    rule: Rule
    bias: tuple[float, ...]
    selected: tuple[bool, ...]

    @classmethod
    def never(cls, categories: int) -> "Controls":
        """Returns the controls under which everything is answered."""
        return cls(Rule.GREEDY, (-math.inf,) * categories, (True,) * categories)

    def to_wire(self) -> WireControls:
        """Returns their form in ``extra_args``."""
        return {"rule": int(self.rule), "row": self._row}

    @cached_property
    def _row(self) -> bytes:
        # A bias beyond fp32 is infinite.
        return array("f", dial_row(self.bias, self.selected, self.rule, 0.0, 0.0)).tobytes()


def dial_row(
    bias: Sequence[float],
    selected: Sequence[bool],
    rule: int,
    temperature: float,
    uniform: float,
) -> list[float]:
    """Returns one row of ``Dials`` (models/decision.py).

    If any bias is ``+inf``, all other tokens are excluded, and the largest margin among those
    categories wins; adding infinity itself would make them tie.

    Args:
        bias: One a category; ``-inf`` never, ``+inf`` always.
        selected: One a category.
        rule: A ``Rule``.
        temperature: The request's.
        uniform: The request's draw, in [0, 1).
    """
    shift = [*bias, 0.0]
    if math.inf in bias:
        shift = [0.0 if b == math.inf else -math.inf for b in shift]
    return [*shift, *bias, *map(float, selected), float(rule), temperature, uniform]


def bias_of_sensitivity(sensitivity: float) -> float:
    """Returns ln(x / (1 - x)): 0 is never, 0.5 as trained, 1 always.

    Raises:
        ValueError: The sensitivity is not within 0..1.
    """
    if not 0.0 <= sensitivity <= 1.0:
        raise ValueError(f"a sensitivity lies between 0 and 1, got {sensitivity}")
    if sensitivity in (0.0, 1.0):
        return math.inf if sensitivity else -math.inf
    return math.log(sensitivity) - math.log1p(-sensitivity)


def sensitivity_of_bias(bias: float) -> float:
    """Returns 1 / (1 + exp(-b)), the inverse of ``bias_of_sensitivity``."""
    small = math.exp(-abs(bias))
    return 1 / (1 + small) if bias >= 0 else small / (1 + small)


def refused_by_own_rule(margins: Sequence[float], bias: Sequence[float]) -> list[bool]:
    """Returns for each category whether ``m_c + b_c >= 0``, whatever the others do."""
    return [
        b == math.inf or (b > -math.inf and m + b >= 0) for m, b in zip(margins, bias, strict=True)
    ]
