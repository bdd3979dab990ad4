import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from models.errors import EvaluationError
from models.margin_maps import MarginMap
from tests.models.margins import calibration_of
from training.calibration.margin_maps import (
    apply_maps,
    fit_isotonic,
    fit_temperature,
    fit_temperatures,
    log_losses,
)
from training.calibration.recalibration import FITS, recalibrated, recalibration_report

Floats = NDArray[np.float64]
Truth = list[str | None]
NAMES = ["a", "b"]


def drawn(rows: int, seed: int = 0) -> tuple[Floats, Truth]:
    """Returns margins that say exactly how likely each category is, and what came of them."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(-1, 2, size=(rows, 2))
    odds = np.column_stack((np.exp(margins), np.ones(rows)))
    shares = (odds / odds.sum(axis=1, keepdims=True)).cumsum(axis=1)
    chosen = (rng.random((rows, 1)) > shares).sum(axis=1)
    return margins, [[*NAMES, None][at] for at in chosen.tolist()]


def columns(truth: Truth) -> NDArray[np.int64]:
    return np.array([[*NAMES, None].index(name) for name in truth])


def test_map_is_linear_between_and_beyond_its_knots() -> None:
    through = MarginMap(((-1.0, 0.0), (1.0, 4.0)), slope_below=0.5, slope_above=3.0)

    margins = [-3.0, -1.0, 0.0, 1.0, 2.0]
    assert through(np.array(margins)).tolist() == [-1.0, 0.0, 2.0, 4.0, 7.0]
    assert [through.at(margin) for margin in margins] == [-1.0, 0.0, 2.0, 4.0, 7.0]


def test_map_of_one_knot_divides_by_the_temperature() -> None:
    half = MarginMap(slope_below=0.5, slope_above=0.5)

    assert half(np.array([-4.0, 0.0, 6.0])).tolist() == [-2.0, 0.0, 3.0]
    assert MarginMap()(np.array([1.5])).tolist() == [1.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MarginMap(((0.0, 0.0), (1.0, 0.0))),
        lambda: MarginMap(((1.0, 0.0), (0.0, 1.0))),
        lambda: MarginMap(slope_above=0.0),
        lambda: MarginMap(()),
    ],
)
def test_map_that_does_not_increase_is_refused(make: Callable[[], MarginMap]) -> None:
    with pytest.raises(ValueError, match="increase strictly"):
        make()


def test_log_loss_by_hand_and_of_extremes() -> None:
    scores = np.array([math.log(3), math.log(3), -1e4, 1e4])

    found = log_losses(scores, np.array([True, False, True, True]))

    assert found == pytest.approx([math.log(4 / 3), math.log(4), 1e4, 0.0])


def test_temperature_undoes_over_confidence() -> None:
    margins, truth = drawn(4000)

    maps = fit_temperature(margins * 3, columns(truth))

    # Three is the truth; 4,000 rows tell it to within a few percent.
    assert 1 / maps[0].slope_above == pytest.approx(3.0, rel=0.1)
    assert maps[0] == maps[1]


def test_temperature_is_the_best_of_a_fine_grid() -> None:
    margins, truth = drawn(300, seed=5)
    right = columns(truth)

    def loss(temperature: float) -> float:
        odds = np.exp(margins / temperature).sum(axis=1)
        refuse = odds / (1 + odds)
        return float(-np.log(np.where(right < 2, refuse, 1 - refuse)).mean())

    best = min(np.linspace(0.3, 3.0, 2701), key=loss)

    found = 1 / fit_temperature(margins, right)[0].slope_above
    assert found == pytest.approx(best, abs=2e-3)


def test_each_category_has_its_own_temperature() -> None:
    margins, truth = drawn(8000)

    first, second = fit_temperatures(margins * [4.0, 0.5], columns(truth))

    assert 1 / first.slope_above == pytest.approx(4.0, rel=0.15)
    assert 1 / second.slope_above == pytest.approx(0.5, rel=0.15)


def test_isotonic_blocks_by_hand() -> None:
    # Half a hit joins the miss at 1, half a miss the hit at 4; the two between pool at 2.5.
    margins = np.array([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [4.0, 9.0]])
    right = np.array([2, 0, 2, 0])

    own, absent = fit_isotonic(margins, right)

    assert [x for x, _ in own.knots] == [1.0, 2.5, 4.0]
    assert [y for _, y in own.knots] == pytest.approx([-math.log(2), 0.0, math.log(2)])
    assert absent == MarginMap()


def test_isotonic_of_margins_that_tell_nothing_is_a_shift() -> None:
    # Falling shares pool to one block of 3.5 hits and 1.5 misses, its ends counted one and a half.
    margins = np.array([[1.0], [2.0], [3.0], [6.0]])

    (only,) = fit_isotonic(margins, np.array([0, 0, 0, 1]))

    assert np.array(only.knots) == pytest.approx(np.array([[15.5 / 5, math.log(7 / 3)]]))
    assert only(np.array([5.0])) == pytest.approx([1.9 + math.log(7 / 3)])


def test_rows_of_other_categories_have_no_say_in_an_isotonic_map() -> None:
    margins, truth = drawn(500)
    right = columns(truth)
    kept = right != 1

    assert fit_isotonic(margins, right)[0] == fit_isotonic(margins[kept], right[kept])[0]


@pytest.mark.parametrize("method", list(FITS))
def test_every_map_keeps_the_order_within_a_category(method: str) -> None:
    margins, truth = drawn(700, seed=2)
    maps = next(fit for name, fit in FITS.items() if name == method)(margins, columns(truth))
    probes = np.linspace(-60, 60, 5001)

    for entry in maps:
        assert (np.diff(entry(probes)) > 0).all()


@pytest.mark.parametrize("factor", [3.0, 0.3])
def test_wrong_confidence_is_mended(factor: float) -> None:
    margins, truth = drawn(2000)

    found = recalibration_report(margins * factor, truth, NAMES, seed=0)

    assert found.method != "off"
    candidate = found.candidates[found.method]
    assert candidate.improvement["log_loss"].low > 0
    assert candidate.scores.calibration_error < found.uncalibrated.calibration_error / 2
    mapped = found.apply(margins * factor)
    assert np.abs(mapped - margins).mean() < np.abs(margins * factor - margins).mean() / 3


def test_right_confidence_is_left_alone() -> None:
    margins, truth = drawn(2000)

    found = recalibration_report(margins, truth, NAMES, seed=0)

    assert found.method == "off"
    assert found.apply(margins).tolist() == margins.tolist()
    assert not any(candidate.helps for candidate in found.candidates.values())


def test_few_rows_cannot_show_that_a_small_fault_is_mended() -> None:
    margins, truth = drawn(60, seed=1)

    assert recalibration_report(margins * 1.3, truth, NAMES, seed=0).method == "off"


def test_scores_by_hand() -> None:
    # p(refuse) is 3/4 for each of them.
    truth: Truth = ["a", None] * 20
    margins = np.full((40, 1), math.log(3))

    found = recalibration_report(margins, truth, ["a"], seed=0).uncalibrated

    assert found.log_loss == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert found.brier == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert found.calibration_error == pytest.approx(1 / 4)


def test_scores_are_of_rows_that_were_not_fitted() -> None:
    # Margins of pure noise: what the blocks learn of one half is wrong in the other.
    margins = np.random.default_rng(0).normal(0, 0.01, size=(200, 1))
    truth: Truth = ["a", None] * 100

    found = recalibration_report(margins, truth, ["a"], seed=0)

    candidate = found.candidates["isotonic"]
    to_refuse = np.array([name is not None for name in truth])
    in_sample = log_losses(apply_maps(candidate.maps, margins)[:, 0], to_refuse).mean()
    assert candidate.scores.log_loss > in_sample + 0.005
    assert candidate.improvement["log_loss"].value < 0
    assert found.method == "off"


def test_same_seed_gives_the_same_report_and_json_holds_it() -> None:
    margins, truth = drawn(200)
    first = recalibration_report(margins * 3, truth, NAMES, seed=4)
    again = recalibration_report(margins * 3, truth, NAMES, seed=4)

    kept = json.loads(json.dumps(first.as_dict(), allow_nan=False))

    assert kept == json.loads(json.dumps(again.as_dict()))
    assert kept["method"] == first.method
    read = [MarginMap(**kept["maps"][name]) for name in NAMES]
    assert apply_maps(read, margins).tolist() == first.apply(margins).tolist()
    assert first.lines()[-1] == f"recalibration: {first.method}"


@pytest.mark.parametrize(("refusals", "answers"), [(19, 30), (30, 19), (40, 0)])
def test_too_few_rows_of_a_sort_are_an_error(refusals: int, answers: int) -> None:
    truth: Truth = ["a"] * refusals + [None] * answers

    with pytest.raises(EvaluationError, match=rf"got {refusals} and {answers}"):
        recalibration_report(np.zeros((len(truth), 2)), truth, NAMES, seed=0)


def test_category_of_one_row_is_recalibrated_with_the_others() -> None:
    margins, truth = drawn(400)
    kept = [at for at, name in enumerate(truth) if name != "b"]
    kept.append(truth.index("b"))

    found = recalibration_report(margins[kept] * 3, [truth[at] for at in kept], NAMES, seed=0)

    assert found.method != "off"
    assert np.isfinite(found.apply(margins)).all()


def test_broken_margins_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        recalibration_report(np.array([[math.nan, 0.0]]), ["a"], NAMES, seed=0)
    with pytest.raises(ValueError, match="got"):
        recalibration_report(np.zeros((3, 1)), ["a", None, None], NAMES, seed=0)


@pytest.mark.parametrize(("too_sure", "helps"), [(1.0, False), (3.0, True)])
def test_calibration_keeps_the_maps_only_where_they_surely_help(
    too_sure: float, helps: bool
) -> None:
    margins, truth = drawn(1500)
    category = np.where(columns(truth) == 2, -1, columns(truth))
    found = recalibrated(calibration_of(too_sure * margins, category)).info.recalibration
    assert (found is not None) == helps
    if found is not None:
        honest = [found.log_odds(name, too_sure) for name in found.maps]
        assert honest == pytest.approx([1.0, 1.0], abs=0.4)


def test_calibration_without_benign_prompts_keeps_no_maps() -> None:
    margins, _ = drawn(60)
    assert recalibrated(calibration_of(margins, [0, 1] * 30)).info.recalibration is None
