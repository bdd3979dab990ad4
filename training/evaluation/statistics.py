"""Estimates with their 95 % intervals. Pure: numpy in, estimates out."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RESAMPLES = 1000
_Z = 1.959963984540054
# Weights that are held at a time, [resamples, n] fp64: 64 MiB.
_WEIGHTS_AT_ONCE = 2**23

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Estimate(BaseModel):
    """One figure: its value and its 95 % interval, or the reason why there is none.

    Attributes:
        value: None where nothing could be graded; then `reason` says why.
        n: How many prompts, texts or requests it was computed from.
        low: The interval's lower end.
        high: The interval's upper end.
        hits: Of a share, its numerator.
        reason: Only where the value is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    hits: int | None = None
    reason: str | None = None


def missing(reason: str) -> Estimate:
    """Returns the estimate of what could not be measured."""
    return Estimate(value=None, n=0, reason=reason)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share, n at least 1.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    share, square = hits / n, _Z * _Z / n
    centre = share + square / 2
    half = _Z * math.sqrt((share * (1 - share) + square / 4) / n)
    low = 0.0 if hits == 0 else (centre - half) / (1 + square)
    high = 1.0 if hits == n else (centre + half) / (1 + square)
    return low, high


def share(hits: Flags, reason: str) -> Estimate:
    """Returns the share of the true ones; `reason` says what is lacking where there are none."""
    return counted(int(np.count_nonzero(hits)), len(hits), reason)


def counted(hits: int, n: int, reason: str) -> Estimate:
    """Returns a share from its counts; `reason` says what is lacking where n is 0."""
    if not n:
        return missing(reason)
    low, high = wilson(hits, n)
    return Estimate(value=hits / n, n=n, low=low, high=high, hits=hits)


class Resamples:
    """Bootstrap resamples of n prompts, the same ones for every figure of these prompts.

    A resample is the number of times that each prompt was drawn.

    Args:
        n: At least 1.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._seed = seed

    def of(self, figure: Callable[[Floats], Floats]) -> Floats:
        """Returns the figure of each resample, NaN where a resample has none.

        Args:
            figure: From `[resamples, n]` weights to `[resamples]` figures.
        """
        return np.concatenate([figure(weights) for weights in self._drawn()])

    def _drawn(self) -> Iterator[Floats]:
        if self.n * RESAMPLES <= _WEIGHTS_AT_ONCE:
            yield self._whole
            return
        rng = np.random.default_rng(self._seed)
        at_once = max(1, _WEIGHTS_AT_ONCE // self.n)
        for done in range(0, RESAMPLES, at_once):
            yield self._some(rng, min(at_once, RESAMPLES - done))

    @cached_property
    def _whole(self) -> Floats:
        return self._some(np.random.default_rng(self._seed), RESAMPLES)

    def _some(self, rng: np.random.Generator, count: int) -> Floats:
        even = np.full(self.n, 1 / self.n)
        return rng.multinomial(self.n, even, size=count).astype(np.float64)


def percentiles(resampled: Floats) -> tuple[float, float]:
    """Returns the percentile interval of resampled figures, of which some may be NaN."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def auc(scores: Floats, positive: Flags) -> Callable[[Floats], Floats]:
    """Returns the figure: the chance that a positive prompt scores above another; ties count half.

    Args:
        scores: `[n]`.
        positive: `[n]`.
    """
    order = np.argsort(scores, kind="stable")
    ranked, hit = scores[order], positive[order]
    first = np.searchsorted(ranked, ranked, side="left")
    last = np.searchsorted(ranked, ranked, side="right")

    def figure(weights: Floats) -> Floats:
        drawn = weights[:, order]
        below = np.pad(np.cumsum(drawn * ~hit, axis=1), ((0, 0), (1, 0)))
        wins = (below[:, first] + below[:, last]) / 2
        pairs = (drawn * hit).sum(axis=1) * below[:, -1]
        return _divided((drawn * hit * wins).sum(axis=1), pairs)

    return figure


def f1(chosen: Flags, positive: Flags) -> Callable[[Floats], Floats]:
    """Returns the figure: the harmonic mean of precision and recall of `chosen`."""

    def figure(weights: Floats) -> Floats:
        right = weights @ (chosen & positive)
        return _divided(2 * right, weights @ chosen + weights @ positive)

    return figure


def binned_error(gaps: Floats, bins: list[NDArray[np.int64]]) -> Callable[[Floats], Floats]:
    """Returns the figure: the mean over prompts of the absolute mean gap of a prompt's bin.

    Args:
        gaps: `[n]` predicted probability minus outcome.
        bins: The prompts of each bin, fixed over resamples.
    """

    def figure(weights: Floats) -> Floats:
        parts = [np.abs(weights[:, part] @ gaps[part]) for part in bins]
        return _divided(np.sum(parts, axis=0), weights.sum(axis=1))

    return figure


def mean(values: Floats) -> Callable[[Floats], Floats]:
    """Returns the figure: the mean of `values`, of those prompts alone that have one (not NaN)."""
    known = np.isfinite(values)

    def figure(weights: Floats) -> Floats:
        return _divided(weights[:, known] @ values[known], weights[:, known].sum(axis=1))

    return figure


def bootstrapped(
    figure: Callable[[Floats], Floats],
    resamples: Resamples,
    *,
    rarer: int | None = None,
    centred: bool = False,
) -> Estimate:
    """Returns the figure of the prompts as they are, with its percentile interval.

    Args:
        rarer: Number of prompts of the rarer sort. A figure of exactly 0 or 1 is the same in every
            resample; its interval is then Wilson's of so many prompts.
        centred: Shifts the interval by the resamples' mean error: for a mean of absolute values,
            which any resampling enlarges.
    """
    value = of_all(figure, resamples.n)
    resampled = resamples.of(figure)
    low, high = percentiles(resampled)
    if centred:
        error = float(np.nanmean(resampled)) - value
        low, high = max(0.0, min(value, low - error)), max(value, high - error)
    if rarer and low == high and value in (0.0, 1.0):
        low, high = wilson(int(value) * rarer, rarer)
    return Estimate(value=value, n=resamples.n, low=low, high=high)


def of_all(figure: Callable[[Floats], Floats], n: int) -> float:
    """Returns the figure of the n prompts as they are."""
    return float(figure(np.ones((1, n)))[0])


def _divided(above: Floats, below: Floats) -> Floats:
    quotient = np.full(np.shape(below), np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient
