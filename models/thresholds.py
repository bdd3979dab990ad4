"""Solving for the rule ``greedy``, which compares margins with thresholds.

It refuses a prompt where for some category ``margin >= -bias``. An fp32 sum ``margin + bias`` is
negative exactly where the exact sum is, so the comparison is the engine's own, to the bit.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.calibration import BENIGN, Floats

Doubles = npt.NDArray[np.float64]

# Distance of a threshold from the last known score: far above fp32's noise, far below the distance
# of prompts.
_EDGE = 1 / 64
_SWEEPS = 40


class ThresholdRule:
    """A calibration's margins, laid out for solving. Immutable; safe to share between threads.

    Args:
        margins: ``[n, k]`` fp32.
        category: ``[n]``, the index of each prompt's category.

    Attributes:
        groups: Each category's prompts, ``[k, n_c]``, by their own category's margin, falling.
        benign: The benign prompts, ``[k, n_benign]``.
        benign_falling: The same, each row sorted by itself.
    """

    def __init__(self, margins: Floats, category: npt.NDArray[np.int64]) -> None:
        k = margins.shape[1]
        places = [np.flatnonzero(category == c) for c in (*range(k), BENIGN)]
        for c in range(k):
            places[c] = places[c][np.argsort(-margins[places[c], c], kind="stable")]
        self._margins = np.ascontiguousarray(margins[np.concatenate(places)].T)
        sizes = [len(some) for some in places if len(some)]
        ends: npt.NDArray[np.int64] = np.cumsum(sizes, dtype=np.int64)
        self._starts: npt.NDArray[np.int64] = ends - np.array(sizes, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.float64)
        self.groups = [self._margins[:, end - n : end] for n, end in zip(sizes, ends, strict=True)]
        self.benign = self.groups.pop() if len(sizes) > k else self._margins[:, :0]
        self.benign_falling = -np.sort(-self.benign, axis=1)
        self.benign_count = int(self.benign.shape[1])

    def shares(self, bias: Doubles) -> Doubles:
        """Returns which share any token refuses: of each category's prompts, and of the benign."""
        refused = _refused(self._margins, _thresholds(bias))
        counts = np.add.reduceat(refused, self._starts, dtype=np.int64)
        shares: Doubles = counts / self._sizes
        return shares

    def own_falses(self, bias: Doubles) -> Doubles:
        """Returns, for each category, the share of benign prompts that its own rule refuses."""
        refused = self.benign >= _thresholds(bias)[:, None]
        counts: npt.NDArray[np.int64] = np.count_nonzero(refused, axis=1)
        return counts / self.benign_count

    def rate(self, category: int, bias: Doubles) -> float:
        """Returns the share of a category's prompts that any token refuses."""
        return self._share(category, _thresholds(bias))

    def total_false(self, bias: Doubles) -> float:
        """Returns the share of the benign prompts that any token refuses."""
        return _count(self.benign, _thresholds(bias)) / self.benign_count

    def own_false(self, category: int, bias: float) -> float:
        """Returns the share of the benign prompts that a category's own rule refuses."""
        return _tied(self.benign_falling[category], np.float32(-bias))[1] / self.benign_count

    def alone(self, category: int, rate: float) -> float:
        """Returns a bias near the one for a rate, to start from."""
        own = self.groups[category][category]
        return -float(own[min(int(rate * len(own)), len(own) - 1)])

    def own_bias(self, category: int, allowed: int) -> float:
        """Returns the largest bias whose own rule refuses at most so many benign prompts.

        Args:
            category: Index of the category.
            allowed: Number of prompts, less than all of them.
        """
        return -float(_above(self.benign_falling[category], allowed))

    def shift(self, free: list[int], bias: Doubles, allowed: int) -> float | None:
        """Returns the largest common bias of the free categories that keeps a total.

        Args:
            free: Indices of the categories that share the bias.
            bias: ``[k]``; those of the free categories are ignored.
            allowed: Number of benign prompts that any token may refuse.

        Returns:
            The bias, or None where the others alone refuse more.
        """
        held = bias.copy()
        held[free] = -math.inf
        refused = _refused(self.benign, _thresholds(held))
        left = allowed - int(refused.sum())
        if left < 0:
            return None
        highest = self.benign[free][:, ~refused].max(axis=0)
        return -float(_above(-np.sort(-highest), left))

    def span(self, category: int) -> tuple[float, float]:
        """Returns the biases between which a category's rates go from nearly 0 to nearly 1."""
        known = np.concatenate((self.groups[category][category], self.benign[category], [0.0]))
        low, high = np.quantile(known, (0.001, 0.999))
        return -float(high) - 0.5, -float(low) + 0.5

    def meet(self, rates: Mapping[int, float], bias: Doubles) -> Doubles:
        """Returns the biases that bring every rate as near to its target as the others allow.

        Fits one threshold after the other, the others fixed, until none moves: an equilibrium. One
        exists where rates are continuous (Brouwer). There a rate exceeds its target only where the
        other tokens alone refuse more, with the category's own dial at never.

        Args:
            rates: Targets by category index.
            bias: ``[k]``: fixed for the other categories, the start for these (see ``alone``).
        """
        wanted = {c: _wanted(rate, self.groups[c].shape[1]) for c, rate in rates.items()}
        thresholds = _thresholds(bias)
        best, least = thresholds.copy(), (math.inf, math.inf)
        for sweep in range(2 * _SWEEPS):
            moved = False
            for c in rates:
                found = self._fit(c, wanted[c], thresholds, keep=sweep > 1)
                if found != thresholds[c]:
                    moved = True
                    # A cycle: dials that push each other meet half-way.
                    thresholds[c] = _halfway(thresholds[c], found) if sweep > _SWEEPS else found
            if not moved:
                best = thresholds
                break
            if sweep >= _SWEEPS:
                errors = [abs(self._share(c, thresholds) - rate) for c, rate in rates.items()]
                if (max(errors), sum(errors)) < least:
                    best, least = thresholds.copy(), (max(errors), sum(errors))
        solved = bias.copy()
        for c in rates:
            solved[c] = -best[c]
        return solved

    def _share(self, category: int, thresholds: Floats) -> float:
        group = self.groups[category]
        return _count(group, thresholds) / int(group.shape[1])

    def _fit(self, category: int, wanted: int, thresholds: Floats, *, keep: bool) -> np.float32:
        """Returns the threshold with which a category's count is nearest to the wanted one.

        ``keep`` keeps a threshold that already gives the wanted count: otherwise thresholds keep
        moving in the gaps between two prompts.
        """
        group, own = self.groups[category], thresholds[category]
        thresholds[category] = np.inf
        others = _refused(group, thresholds)
        thresholds[category] = own
        left = wanted - int(np.count_nonzero(others))
        free = group[category][~others]
        if keep and np.count_nonzero(free >= own) == left:
            return np.float32(own)
        if wanted == 0 or left < 0 or not len(free):
            return np.float32(np.inf)
        return _between(free, left)


def _thresholds(bias: Doubles) -> Floats:
    return (-bias).astype(np.float32)


def _refused(scores: Floats, thresholds: Floats) -> npt.NDArray[np.bool_]:
    refused: npt.NDArray[np.bool_] = np.logical_or.reduce(scores >= thresholds[:, None], axis=0)
    return refused


def _count(scores: Floats, thresholds: Floats) -> int:
    return int(np.count_nonzero(_refused(scores, thresholds)))


def _wanted(rate: float, n: int) -> int:
    return math.floor(rate * n + 0.5)


def _halfway(old: np.float32, new: np.float32) -> np.float32:
    return np.float32((old + new) / 2) if np.isfinite(old) and np.isfinite(new) else new


def _between(falling: Floats, count: int) -> np.float32:
    """Returns a threshold that lets ``count`` of the scores in, or the nearest number ties allow.

    Args:
        falling: ``[m]`` scores, m at least 1, falling.
        count: 0 or more; all of them where there are not so many.
    """
    count = min(count, len(falling))
    if 0 < count < len(falling) and falling[count - 1] == falling[count]:
        fewer, more = _tied(falling, falling[count])
        count = fewer if count - fewer < more - count else more
    if count == len(falling):
        return np.float32(falling[-1] - _EDGE)
    return _above(falling, count)


def _above(falling: Floats, index: int) -> np.float32:
    """Returns a threshold above the score at ``index``, not above the next larger score."""
    lower = falling[index]
    larger = _tied(falling, lower)[0]
    if larger == 0:
        return max(np.float32(lower + _EDGE), np.nextafter(lower, np.float32(np.inf)))
    upper = falling[larger - 1]
    middle = np.float32((float(lower) + float(upper)) / 2)
    return middle if lower < middle else upper


def _tied(falling: Floats, score: Any) -> tuple[int, int]:
    """Returns how many scores are larger than this one, and how many at least as large."""
    rising = falling[::-1]
    return (
        len(rising) - int(np.searchsorted(rising, score, side="right")),
        len(rising) - int(np.searchsorted(rising, score, side="left")),
    )
