import itertools
import math

import pytest

from server.dials.floors import Bounded, Bounds

INF = math.inf
ASKED = (-INF, -1e39, -2.0, -0.0, 0.0, 1.0, 1.5, 1e39, INF)


@pytest.mark.parametrize(
    ("floor", "ceiling"),
    [(-INF, INF), (-1.0, 1.0), (1.0, INF), (-INF, -1.0), (0.5, 0.5), (INF, INF)],
)
def test_every_bias_ends_within_its_bounds(floor: float, ceiling: float) -> None:
    bounds = Bounds((floor,), (ceiling,))
    for asked in ASKED:
        held = bounds.clamp(0, asked)
        assert floor <= held.bias <= ceiling
        assert (held.side is None) == (held.bias == asked)
        assert (held.side == "floor") == (asked < floor)
        assert (held.side == "ceiling") == (asked > ceiling)
    assert bounds.clamp_all([asked]) == (held.bias,)


def test_no_number_ends_at_the_floor() -> None:
    assert Bounds((1.0,), (INF,)).clamp(0, math.nan) == Bounded(1.0, "floor")
    assert Bounds.none(1).clamp(0, math.nan) == Bounded(-INF, "floor")


def test_each_category_has_its_own_bounds() -> None:
    bounds = Bounds((1.0, -INF), (INF, -1.0))
    for asked in itertools.product(ASKED, repeat=2):
        assert bounds.clamp_all(asked) == (max(1.0, asked[0]), min(-1.0, asked[1]))


def test_nobodys_dial_rests_as_trained_or_at_the_nearest_bound() -> None:
    bounds = Bounds((1.0, -INF, -1.0), (INF, -2.0, 1.0))
    assert [bounds.unset(c) for c in range(3)] == [1.0, -2.0, 0.0]


def test_a_floor_at_never_guards_nothing() -> None:
    assert not Bounds.none(2).has_floor
    assert not Bounds((-INF,), (0.0,)).has_floor
    assert Bounds((-INF, -5.0), (INF, INF)).has_floor


@pytest.mark.parametrize(
    ("floor", "ceiling"), [(1.0, 0.0), (INF, -INF), (math.nan, 0.0), (0.0, math.nan)]
)
def test_bounds_that_leave_no_room_are_refused(floor: float, ceiling: float) -> None:
    with pytest.raises(ValueError, match="floor"):
        Bounds((floor,), (ceiling,))
