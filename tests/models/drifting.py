"""Margins of made-up prompts: two categories, and benign ones."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.histogram import histogram

NAMES = ("safety", "humanizing")
MEANS = {0: (3.0, -3.0), 1: (-4.0, 2.0), -1: (-5.0, -5.0)}

Floats = NDArray[np.float64]


def prompts(
    rng: np.random.Generator, sizes: dict[int, int], shift: float = 0.0
) -> tuple[Floats, NDArray[np.int64]]:
    """Returns margins `[n, 2]` and labels `[n]`; `sizes` has the number of each label."""
    labels = np.repeat(list(sizes), list(sizes.values()))
    means = np.array([MEANS[label] for label in labels])
    return rng.normal(means + shift, 1.5), labels


def counts(margins: Floats) -> dict[str, Sequence[int]]:
    return {name: histogram(margins[:, at]).tolist() for at, name in enumerate(NAMES)}
