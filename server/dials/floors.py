"""Floors and ceilings: the biases between which a policy's requests may move their dials."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Side = Literal["floor", "ceiling"]


class Bounded(NamedTuple):
    """A bias within its bounds.

    Attributes:
        bias: The nearest allowed bias.
        side: The bound that it was moved to, if any.
    """

    bias: float
    side: Side | None


@dataclass(frozen=True)
class Bounds:
    """One policy's bounds, one entry a category in manifest order.

    Attributes:
        floors: Least bias; ``-inf`` for no floor.
        ceilings: Greatest bias; ``+inf`` for no ceiling.
        refuses: Whether a request beyond a bound is refused; otherwise its dial is moved.
        calibrated: Whether a bound was solved on a calibration, and so holds for the checkpoint's
            own weights only.

    Raises:
        ValueError: A floor lies above its ceiling, or a bound is NaN.
    """

    floors: tuple[float, ...]
    ceilings: tuple[float, ...]
    refuses: bool = False
    calibrated: bool = False

    def __post_init__(self) -> None:
        for floor, ceiling in zip(self.floors, self.ceilings, strict=True):
            if not floor <= ceiling:
                raise ValueError(f"the floor {floor} does not lie below the ceiling {ceiling}")

    @classmethod
    def none(cls, categories: int) -> "Bounds":
        """Returns the bounds that allow everything."""
        return cls((-math.inf,) * categories, (math.inf,) * categories)

    @cached_property
    def has_floor(self) -> bool:
        """Whether any category has a floor."""
        return any(floor > -math.inf for floor in self.floors)

    @cached_property
    def allow_all(self) -> bool:
        """Whether there is neither a floor nor a ceiling."""
        return not self.has_floor and all(ceiling == math.inf for ceiling in self.ceilings)

    def clamp(self, category: int, bias: float) -> Bounded:
        """Returns a category's bias, moved to the bound that it exceeds."""
        # Written so that NaN ends at the floor.
        if not bias >= self.floors[category]:
            return Bounded(self.floors[category], "floor")
        if bias > self.ceilings[category]:
            return Bounded(self.ceilings[category], "ceiling")
        return Bounded(bias, None)

    def clamp_all(self, biases: Sequence[float]) -> tuple[float, ...]:
        """Returns all biases, each within its bounds."""
        if self.allow_all:
            return tuple(biases)
        return tuple(self.clamp(c, bias).bias for c, bias in enumerate(biases))

    def describe(self, category: int, side: Side) -> str:
        """Returns the most that a request may ask in one direction, in words."""
        bound = self.floors[category] if side == "floor" else self.ceilings[category]
        less = "less" if side == "floor" else "more"
        shown = {math.inf: "always", -math.inf: "never"}.get(bound, f"a bias of {bound:.6g}")
        return f"no {less} than its {side}, {shown}"

    def unset(self, category: int) -> float:
        """Returns the bias of an unset category: 0, or the nearest allowed bias."""
        return self.clamp(category, 0.0).bias
