"""How far two readers of the same texts agree. Pure: outcomes in, estimates out."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from training.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    Floats,
    counted,
    missing,
    percentiles,
)
from training.judging.exchanges import Outcome
from training.judging.report import PairReport

DECIDED: tuple[Outcome, ...] = ("answered", "refused")

Counts = NDArray[np.int64]


def pairs(read: Mapping[str, Sequence[Outcome]], seed: int = 0) -> dict[str, PairReport]:
    """Compares every two readers.

    Args:
        read: By reader's name, the `[n]` outcomes.
        seed: Of the bootstrap.

    Returns:
        By both names, joined by a hyphen.
    """
    return {
        f"{first}-{second}": _compared(table(read[first], read[second]), seed)
        for first, second in combinations(read, 2)
    }


def table(first: Sequence[Outcome], second: Sequence[Outcome]) -> Counts:
    """Returns the `[2, 2]` counts of texts that both decided; row and column 1 is "refused"."""
    cells = np.zeros((2, 2), dtype=np.int64)
    for one, other in zip(first, second, strict=True):
        if "undecided" not in (one, other):
            cells[DECIDED.index(one), DECIDED.index(other)] += 1
    return cells


def cohens_kappa(cells: NDArray[np.number]) -> Floats:
    """Returns agreement beyond chance, `[...]` from `[..., 2, 2]` counts; NaN where undefined.

    Source: Cohen, Educ. Psychol. Meas. 20 (1960).
    """
    shares = cells / cells.sum(axis=(-2, -1), keepdims=True)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(axis=-1) * shares.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        kappa: Floats = (observed - expected) / (1 - expected)
    return np.where(expected == 1, np.nan, kappa)


def _compared(cells: Counts, seed: int) -> PairReport:
    both = int(cells.sum())
    agreement = counted(int(np.trace(cells)), both, "no text was decided by both")
    return PairReport(agreement=agreement, kappa=_kappa(cells, both, seed))


def _kappa(cells: Counts, both: int, seed: int) -> Estimate:
    if not both:
        return missing("no text was decided by both")
    if both in np.diag(cells):
        return missing("both know one outcome only: agreement by chance is certain")
    drawn = np.random.default_rng(seed).multinomial(both, cells.ravel() / both, size=RESAMPLES)
    low, high = percentiles(cohens_kappa(drawn.reshape(RESAMPLES, 2, 2)))
    return Estimate(value=float(cohens_kappa(cells)), n=both, low=low, high=high)
