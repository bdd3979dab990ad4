"""Strictly increasing maps of margins, one a category.

They keep the order of margins within a category, so that every refusal rate that a bias could reach
can still be reached.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MarginMap:
    """A strictly increasing, piecewise linear map of margins.

    Attributes:
        knots: Pairs of margin and mapped margin, both strictly increasing; one at least.
        slope_below: Of the map below the first knot; above 0.
        slope_above: Of the map above the last knot; above 0.
    """

    knots: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    slope_below: float = 1.0
    slope_above: float = 1.0

    def __post_init__(self) -> None:
        steps = np.diff(np.array(self.knots).reshape(-1, 2), axis=0)
        slopes = np.array([self.slope_below, self.slope_above])
        if not self.knots or not (np.all(steps > 0) and np.all(slopes > 0)):
            raise ValueError("a map of margins needs knots and must increase strictly")

    def __call__(self, margins: Doubles) -> Doubles:
        """Returns the mapped margins, in the shape of `margins`."""
        x, y = np.array(self.knots).T
        below = np.minimum(margins - x[0], 0) * self.slope_below
        above = np.maximum(margins - x[-1], 0) * self.slope_above
        mapped: Doubles = np.interp(margins, x, y) + below + above
        return mapped

    def at(self, margin: float) -> float:
        """Returns one mapped margin."""
        place = bisect_right(self.knots, (margin, math.inf))
        if place == 0:
            x, y = self.knots[0]
            return y + (margin - x) * self.slope_below
        x, y = self.knots[place - 1]
        if place == len(self.knots):
            return y + (margin - x) * self.slope_above
        next_x, next_y = self.knots[place]
        return y + (margin - x) * (next_y - y) / (next_x - x)
