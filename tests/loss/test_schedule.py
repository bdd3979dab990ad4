import math

import pytest

from loss.schedule import parameter_at


def test_moves_evenly_and_then_stays() -> None:
    way = [parameter_at(-0.5, 1.5, 0.5, progress) for progress in (0.0, 0.125, 0.25, 0.5, 1.0)]
    assert way == [-0.5, 0.0, 0.5, 1.5, 1.5]


def test_ends_on_the_number_itself() -> None:
    # 0.1 + (0.7 - 0.1) is not 0.7 in binary.
    assert parameter_at(0.1, 0.7, 1.0, 1.0) == 0.7
    assert parameter_at(0.1, 0.7, 0.3, 0.3) == 0.7


def test_falls_as_it_rises() -> None:
    assert parameter_at(2.0, 0.0, 0.8, 0.2) == pytest.approx(1.5)


@pytest.mark.parametrize("over", [0.0, -0.1, 1.01, math.nan])
def test_over_out_of_range_is_named(over: float) -> None:
    with pytest.raises(ValueError, match="over must be above 0 and at most 1"):
        parameter_at(0.0, 1.0, over, 0.5)


@pytest.mark.parametrize("progress", [-1e-9, 1.001, math.nan])
def test_progress_out_of_range_is_named(progress: float) -> None:
    with pytest.raises(ValueError, match="progress must be 0 to 1"):
        parameter_at(0.0, 1.0, 1.0, progress)


def test_infinite_ends_are_named() -> None:
    with pytest.raises(ValueError, match=r"start and end must be finite, not 0\.0 and inf"):
        parameter_at(0.0, math.inf, 1.0, 0.5)
