"""Medians and intervals of paired rounds: two starts of one server differ more than its rounds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
RESAMPLES = 4000
# Each holds all latencies.
QUANTILE_RESAMPLES = 300


class Estimate(NamedTuple):
    """A value with its 95 % interval (bootstrap of starts, then of rounds)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def estimate(starts: Values) -> Estimate:
    """Returns the median and its interval; ``[starts, rounds]``."""
    rows, columns = _drawn(starts, RESAMPLES)
    medians = np.median(starts[rows, columns], (1, 2))
    return _interval(float(np.median(starts)), medians)


def quantile_ratios(
    own: Values, other: Values, quantiles: Sequence[float]
) -> dict[float, Estimate]:
    """Returns ``own``'s quantiles of all requests over ``other``'s.

    Args:
        own: ``[starts, rounds, requests]``; a round and the same round of ``other`` are drawn
            together.
        other: Likewise.
        quantiles: Each 0..1.
    """
    rows, columns = _drawn(own, QUANTILE_RESAMPLES)
    places = list(quantiles)
    whole = np.quantile(own, places) / np.quantile(other, places)
    drawn = _quantiles(own[rows, columns], places) / _quantiles(other[rows, columns], places)
    return {
        place: _interval(float(value), ratios)
        for place, value, ratios in zip(places, whole, drawn, strict=True)
    }


def added_median(own: Values, other: Values) -> Estimate:
    """Returns ``own``'s median minus ``other``'s; arguments as of ``quantile_ratios``."""
    rows, columns = _drawn(own, QUANTILE_RESAMPLES)
    drawn = _quantiles(own[rows, columns], [0.5]) - _quantiles(other[rows, columns], [0.5])
    return _interval(float(np.median(own) - np.median(other)), drawn[0])


def _drawn(values: Values, resamples: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    starts, rounds = values.shape[:2]
    rng = np.random.default_rng(0)
    rows = rng.integers(starts, size=(resamples, starts, 1))
    return rows, rng.integers(rounds, size=(resamples, starts, rounds))


def _quantiles(drawn: Values, quantiles: list[float]) -> Values:
    """Returns ``[quantiles, resamples]``."""
    return np.asarray(np.quantile(drawn.reshape(len(drawn), -1), quantiles, axis=1))


def _interval(whole: float, resampled: Values) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(whole, float(low), float(high))
