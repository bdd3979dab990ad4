"""Random logits and dials, for tests of the decision."""

import itertools
import math
import random
import struct
from collections.abc import Sequence

import torch

from models.controls import Rule, dial_row
from models.decision import Dials

INF = math.inf
K = 3
BIAS_MIXES = [
    *itertools.product([-INF, 0.0, INF], repeat=K),
    (0.5, -0.5, 2.0),
    (-3.0, INF, 3.0),
    (-INF, 1.25, -1.25),
    (INF, INF, -7.5),
    (40.0, -40.0, 0.0),
]


def fp32(value: float) -> float:
    """Rounds to the nearest fp32, as a plain Python float."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def dials(
    bias: Sequence[Sequence[float]],
    rule: Rule | Sequence[Rule] = Rule.GREEDY,
    *,
    selected: Sequence[Sequence[bool]] | None = None,
    temperature: float | Sequence[float] = 1.0,
    uniform: float | Sequence[float] = 0.0,
) -> Dials:
    rows = len(bias)

    def column(value: float | Sequence[float]) -> list[float]:
        return [value] * rows if isinstance(value, int | float) else list(value)

    named = selected or [[True] * len(bias[0])] * rows
    numbers = zip(column(rule), column(temperature), column(uniform), strict=True)
    table = [
        dial_row(b, s, int(r), t, u) for b, s, (r, t, u) in zip(bias, named, numbers, strict=True)
    ]
    return Dials(torch.tensor(table, dtype=torch.float32), len(bias[0]))


def random_logits(rows: int, seed: int, scale: float = 3.0) -> list[list[float]]:
    rng = random.Random(seed)
    return [[fp32(rng.gauss(0, scale)) for _ in range(K + 1)] for _ in range(rows)]
