"""Whether recorded traffic still looks like the prompts of a calibration.

The server sees prompts without their categories, and their mix is the traffic's, not the
calibration file's: more greetings on Monday is no drift. What a calibration rests on is each
category's own margins. So the mix is estimated first, as the shares of the calibration's groups
(every category, and the benign prompts) under which the recorded counts are most likely; what is
tested is whether the calibration in that mix explains the counts.

The test is Kolmogorov-Smirnov's with two samples, on the bins of `models.histogram`, once for each
category's margin. Its statistic is the largest difference of two shares "margin above b" over all
bin edges b, so it says by how many points a rate can be off. On binned values the test is
conservative, and needs no bin to be filled; a chi-square test of homogeneity would need sparse
bins merged, and answers a question nobody asks (does any bin differ) with less power for shifts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import EvaluationError
from models.histogram import BINS, EDGES, histogram

BENIGN = "benign"
ALPHA = 0.01
TOLERANCE = 0.02
# Keeps an empty bin of the calibration from ruling a group out; only the mix sees it.
SMOOTHING = 0.05
MAX_STEPS = 2000
SETTLED = 1e-7

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


class Reference(NamedTuple):
    """A calibration's margins, binned by group.

    Attributes:
        groups: The groups that have prompts: category names, and `benign`.
        sizes: `[groups]` prompts of each.
        counts: `[groups, k, BINS]` how many margins of each category fall into each bin.
    """

    groups: tuple[str, ...]
    sizes: Counts
    counts: Counts


@dataclass(frozen=True)
class CategoryDrift:
    """The test of one category's margin.

    Attributes:
        distance: Largest difference of the shares above a bin edge, 0..1.
        at: The log-odds of that edge.
        limit: What the distance must exceed to count as drift: to be significant, and the
            tolerance.
        p_value: How likely so large a distance is where nothing drifted; before Bonferroni.
    """

    category: str
    distance: float
    at: float
    limit: float
    p_value: float

    @property
    def drifted(self) -> bool:
        """Whether the distance exceeds the limit."""
        return self.distance > self.limit


@dataclass(frozen=True)
class DriftReport:
    """What the recorded margins say about a calibration.

    Attributes:
        rows: Recorded decisions.
        mix: Estimated share of each of the calibration's groups.
        categories: The tests, in manifest order.
        observed: `[k, BINS]` shares of the recorded margins.
        expected: `[k, BINS]` shares of the calibration's margins in that mix.
    """

    rows: int
    mix: Mapping[str, float]
    categories: tuple[CategoryDrift, ...]
    observed: Floats
    expected: Floats

    @property
    def drifted(self) -> bool:
        """Whether any category drifted."""
        return any(category.drifted for category in self.categories)


def reference(
    margins: NDArray[np.floating], category: NDArray[np.integer], names: Sequence[str]
) -> Reference:
    """Bins a calibration.

    Args:
        margins: `[n, k]` log-odds.
        category: `[n]` index into `names`, -1 for benign prompts.
    """
    labelled = dict(enumerate((*names, BENIGN)))
    of_group = np.where(category < 0, len(names), category)
    present = [label for label in labelled if np.any(of_group == label)]
    counts = [[histogram(column) for column in margins[of_group == g].T] for g in present]
    return Reference(
        tuple(labelled[group] for group in present),
        np.array([int(np.sum(of_group == group)) for group in present]),
        np.array(counts),
    )


def check(
    calibrated: Reference,
    observed: Mapping[str, Sequence[int] | Counts],
    *,
    alpha: float = ALPHA,
    tolerance: float = TOLERANCE,
) -> DriftReport:
    """Tests whether a calibration explains recorded margins.

    Args:
        observed: By category in the calibration's order, `[BINS]` counts of the traffic.
        alpha: Chance of a false alarm over all categories, each tested at `alpha / k`
            (Bonferroni).
        tolerance: Distances up to this are no alarm, however significant: with much traffic
            every difference becomes significant.

    Source:
        Two-sample Kolmogorov-Smirnov: Smirnov, Annals of Mathematical Statistics 19 (1948). Shares
        of known groups by expectation-maximisation: Saerens, Latinne and Decaestecker, Neural
        Computation 14 (2002). Kish's effective sample size for the reweighted calibration.
    """
    seen = np.array(list(observed.values()), dtype=np.int64)
    if seen.shape != calibrated.counts.shape[1:]:
        raise ValueError(f"counts of shape {calibrated.counts.shape[1:]} wanted, got {seen.shape}")
    rows = int(seen[0].sum())
    if not rows:
        raise EvaluationError("no margins are recorded yet: there is nothing to check")
    sizes = calibrated.sizes.astype(np.float64)
    mix = estimate_mix(calibrated, seen)
    expected = np.einsum("g,gkb->kb", mix / sizes, calibrated.counts)
    effective = 1.0 / float(np.sum(mix**2 / sizes))
    shares: Floats = seen / rows
    tests = tuple(
        _test(name, own, wanted, (rows, effective), (alpha / len(seen), tolerance))
        for name, own, wanted in zip(observed, shares, expected, strict=True)
    )
    named_mix = dict(zip(calibrated.groups, mix.tolist(), strict=True))
    return DriftReport(rows, named_mix, tests, shares, expected)


def estimate_mix(calibrated: Reference, observed: Counts) -> Floats:
    """Returns the shares of the calibration's groups that explain recorded counts best.

    Expectation-maximisation of the composite likelihood: the `k` margins' histograms are taken as
    if they came from different prompts.

    Returns:
        `[groups]` fp64 shares that add up to 1.
    """
    smooth = calibrated.counts + SMOOTHING
    densities: Floats = smooth / smooth.sum(axis=-1, keepdims=True)
    mix: Floats = np.full(len(calibrated.groups), 1 / len(calibrated.groups))
    for _ in range(MAX_STEPS):
        joint = mix[:, None, None] * densities
        responsible = (joint / joint.sum(axis=0) * observed).sum(axis=(1, 2))
        updated: Floats = responsible / observed.sum()
        settled = float(np.abs(updated - mix).max()) < SETTLED
        mix = updated
        if settled:
            break
    return mix


def _test(
    name: str,
    observed: Floats,
    expected: Floats,
    sizes: tuple[float, float],
    limits: tuple[float, float],
) -> CategoryDrift:
    from scipy.stats import kstwobign

    alpha, tolerance = limits
    gaps = np.abs(np.cumsum(observed - expected)[: BINS - 1])
    distance = float(gaps.max())
    scale = (sizes[0] * sizes[1] / (sizes[0] + sizes[1])) ** 0.5
    return CategoryDrift(
        category=name,
        distance=distance,
        at=EDGES[int(gaps.argmax())],
        limit=max(float(kstwobign.isf(alpha)) / scale, tolerance),
        p_value=float(kstwobign.sf(distance * scale)),
    )
