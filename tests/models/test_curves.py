import itertools

import pytest

from models.calibration import BENIGN
from models.controls import bias_of_sensitivity
from models.curves import curve
from tests.models.margins import random_calibration, rows_of, slow_share


def test_curve_rises_from_next_to_nothing_to_nearly_all() -> None:
    calibration = random_calibration(29, k=1)
    points = curve(calibration, "humanizing")
    assert len(points) == 101
    for before, after in itertools.pairwise(points):
        assert before.bias < after.bias
        assert before.rate <= after.rate
        assert (before.false_refusal_rate or 0) <= (after.false_refusal_rate or 0)
    assert points[0].rate < 0.02
    assert points[-1].rate > 0.98


def test_curve_points_equal_the_slow_reference() -> None:
    calibration = random_calibration(30, k=3, prompts=40, benign=50)
    own, benign = rows_of(calibration, 1), rows_of(calibration, BENIGN)
    points = curve(calibration, "incomplete", points=21)
    assert 0.0 in [point.bias for point in points]
    for point in points:
        assert point.rate == slow_share(own, [0.0, point.bias, 0.0])
        assert point.false_refusal_rate == slow_share([[row[1]] for row in benign], [point.bias])
        assert bias_of_sensitivity(point.sensitivity) == pytest.approx(point.bias, abs=1e-6)
        assert point.rate_interval[0] <= point.rate <= point.rate_interval[1]
        assert point.interval is not None
        assert point.interval[0] <= point.false_refusal_rate <= point.interval[1]


def test_curve_without_benign_prompts_has_no_false_refusals() -> None:
    point, *_ = curve(random_calibration(13, benign=0), "safety", points=5)
    assert (point.false_refusal_rate, point.interval) == (None, None)


def test_unknown_category_is_named() -> None:
    with pytest.raises(ValueError, match="'weather' is none of humanizing"):
        curve(random_calibration(27), "weather")
