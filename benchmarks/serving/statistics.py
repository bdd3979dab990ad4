"""Medians and intervals of paired rounds: two starts of one server differ more than its rounds."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value with its 95 % interval (bootstrap of starts, then of rounds)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def estimate(starts: Values) -> Estimate:
    """Returns the median and its interval; ``[starts, rounds]``."""
    rows, columns = _drawn(*starts.shape)
    medians = np.median(starts[rows, columns], (1, 2))
    return _interval(float(np.median(starts)), medians)


def quantile_ratio(own: Values, other: Values, quantile: float) -> Estimate:
    """Returns ``own``'s quantile of all requests over ``other``'s.

    Args:
        own: ``[starts, rounds, requests]``; a round and the same round of ``other`` are drawn
            together.
        other: Likewise.
    """
    rows, columns = _drawn(*own.shape[:2])
    ratios = _quantiles(own[rows, columns], quantile) / _quantiles(other[rows, columns], quantile)
    whole = np.quantile(own, quantile) / np.quantile(other, quantile)
    return _interval(float(whole), ratios)


def quantile_difference(own: Values, other: Values, quantile: float) -> Estimate:
    """Returns ``own``'s quantile minus ``other``'s; arguments as of ``quantile_ratio``."""
    rows, columns = _drawn(*own.shape[:2])
    added = _quantiles(own[rows, columns], quantile) - _quantiles(other[rows, columns], quantile)
    whole = np.quantile(own, quantile) - np.quantile(other, quantile)
    return _interval(float(whole), added)


def _drawn(starts: int, rounds: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    rows = rng.integers(starts, size=(RESAMPLES, starts, 1))
    return rows, rng.integers(rounds, size=(RESAMPLES, starts, rounds))


def _quantiles(drawn: Values, quantile: float) -> Values:
    flat = drawn.reshape(len(drawn), -1)
    return np.asarray(np.quantile(flat, quantile, axis=1))


def _interval(whole: float, resampled: Values) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(whole, float(low), float(high))
