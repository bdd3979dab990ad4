"""How far two readers of the same texts agree. Pure: numpy in, numbers out."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.judging.exchanges import Outcome

RESAMPLES = 1000
DECIDED: tuple[Outcome, ...] = ("answered", "refused")

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Pair(NamedTuple):
    """Two readers of the same texts.

    Attributes:
        agreed: Texts of which both say the same, among those that both decided.
        both: Texts that both decided.
        kappa: Cohen's kappa on these; None where both know only one outcome, or there are none.
        kappa_interval: Its 95 % interval, by bootstrap.
    """

    first: str
    second: str
    agreed: int
    both: int
    kappa: float | None
    kappa_interval: tuple[float, float] | None


def pairs(read: Mapping[str, Sequence[Outcome]], seed: int = 0) -> list[Pair]:
    """Compares every two readers.

    Args:
        read: By reader's name, the `[n]` outcomes.
        seed: Of the bootstrap.
    """
    return [
        _compared(first, second, table(read[first], read[second]), seed)
        for first, second in combinations(read, 2)
    ]


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


def _compared(first: str, second: str, cells: Counts, seed: int) -> Pair:
    both, agreed = int(cells.sum()), int(np.trace(cells))
    # With one outcome in all, agreement by chance is certain.
    if not both or both in np.diag(cells):
        return Pair(first, second, agreed, both, None, None)
    drawn = np.random.default_rng(seed).multinomial(both, cells.ravel() / both, size=RESAMPLES)
    resampled = cohens_kappa(drawn.reshape(RESAMPLES, 2, 2))
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    kappa = float(cohens_kappa(cells))
    return Pair(first, second, agreed, both, kappa, (float(low), float(high)))
