import math

import numpy as np
import pytest
from numpy.typing import NDArray

from training.measure.metrics import (
    calibration_error,
    decision_metrics,
    refusal_auc,
    refusal_scores,
    refused_at,
    reliability,
)

# Rows: two of "a" (one missed), one of "b" refused as "a", three to answer (one refused).
MARGINS = np.array([[2.0, -1.0], [-1.0, -3.0], [3.0, 2.0], [-4.0, -4.0], [-2.0, -5.0], [-6.0, 1.0]])
TRUTH = ["a", "a", "b", None, None, None]
NAMES = ["a", "b"]


def logits(*probabilities: float) -> NDArray[np.float64]:
    return np.array([math.log(p / (1 - p)) for p in probabilities])


def test_shares_count_what_is_refused_without_dials() -> None:
    found = decision_metrics(MARGINS, TRUTH, NAMES)

    assert found["refused/a"] == 1 / 2
    assert found["refused/b"] == 1.0
    assert found["refused"] == 2 / 3
    assert found["falsely_refused"] == 1 / 3
    assert found["right_category"] == 1 / 2


def test_margin_of_zero_refuses() -> None:
    found = decision_metrics(np.array([[0.0, -1.0], [-1e-9, -1.0]]), [None, None], NAMES)

    assert found["falsely_refused"] == 1 / 2


def test_near_misses_count_by_what_they_look_like() -> None:
    marks = [None, None, None, "a", "a", "b"]

    found = decision_metrics(MARGINS, TRUTH, NAMES, marks)

    assert found["near_miss_refused/a"] == 0.0
    assert found["near_miss_refused/b"] == 1.0
    assert found["near_miss_refused"] == 1 / 3


def test_loss_is_the_cross_entropy_among_the_control_tokens() -> None:
    # Odds 2 : 1 : 1 against the respond token's 1 give it and "b" a quarter, "a" a half.
    margins = np.array([[math.log(2), 0.0]] * 3)

    mean = decision_metrics(margins, ["a", "b", None], NAMES)["loss"]

    assert mean == pytest.approx((math.log(2) + math.log(4) + math.log(4)) / 3)


def test_loss_of_extreme_margins_is_finite() -> None:
    mean = decision_metrics(np.array([[1e4, -1e4]] * 2), ["b", None], NAMES)["loss"]

    assert mean == pytest.approx((2e4 + 1e4) / 2)


@pytest.mark.parametrize(
    ("truth", "absent"),
    [
        (["a", "b"], {"falsely_refused", "auc", "refused_at_5"}),
        ([None, None], {"refused", "refused/a", "right_category", "auc", "refused_at_5"}),
        (["a", None], {"refused/b", "near_miss_refused"}),
    ],
)
def test_what_the_rows_cannot_tell_is_left_out(truth: list[str | None], absent: set[str]) -> None:
    found = decision_metrics(np.array([[1.0, 2.0], [-1.0, 0.5]]), truth, NAMES)

    assert not absent & set(found)
    assert {"loss", "calibration_error"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("margins", "truth", "reason"),
    [
        (np.zeros((2, 3)), ["a", None], "wanted"),
        (np.zeros((0, 2)), [], "one row at least"),
        (np.array([[math.nan, 0.0]]), ["a"], "finite"),
        (np.zeros((1, 2)), ["c"], "'c' is none of a, b"),
    ],
)
def test_wrong_arguments_are_named(
    margins: NDArray[np.float64], truth: list[str | None], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        decision_metrics(margins, truth, NAMES)


def test_refused_at_5_is_what_greedy_reaches_with_one_bias() -> None:
    # The largest margin of the row to refuse is above those of all answered rows; by the
    # log-sum-exp of both margins the answered rows would come first.
    margins = np.array([[1.0, -9.0], *[[0.9, 0.9]] * 20])

    assert decision_metrics(margins, ["a", *[None] * 20], NAMES)["refused_at_5"] == 1.0


def _refused_at(own: list[float], benign: list[float]) -> float | None:
    scores = np.array(own + benign)
    return refused_at(scores, np.arange(scores.size) < len(own), 0.05)


def test_threshold_lets_five_percent_of_the_answers_be_refused() -> None:
    # One of 20 may be refused, so the threshold lies just above the second largest, 18.
    assert _refused_at([18.0, 18.5, 30.0, 1.0], [float(n) for n in range(20)]) == 2 / 4
    # None of 19 may be.
    assert _refused_at([18.0, 18.5, 30.0, 1.0], [float(n) for n in range(19)]) == 2 / 4
    assert _refused_at([17.5, 18.5, 30.0, 1.0], [float(n) for n in range(20)]) == 2 / 4


def test_tied_answers_do_not_break_the_bound() -> None:
    # Refusing from 19 on would refuse two of 20 answers.
    assert _refused_at([19.0, 20.0], [19.0, 19.0] + [0.0] * 18) == 1 / 2


def test_threshold_of_sixty_allows_three() -> None:
    benign = [float(n) for n in range(60)]

    assert _refused_at([56.5, 55.5], benign) == 1 / 2


def test_share_at_five_percent_needs_both_sorts() -> None:
    assert _refused_at([1.0], []) is None
    assert _refused_at([], [1.0]) is None


def test_calibration_error_by_hand() -> None:
    scores = logits(0.9, 0.1, 0.2, 0.8)
    to_refuse = np.array([True, False, False, True])

    # Bins {.1, .2} with none and {.8, .9} with all to be refused.
    low, high = reliability(scores, to_refuse, bins=2)
    assert (low.hits, low.total, high.hits, high.total) == (0, 2, 2, 2)
    assert (low.predicted, high.predicted) == pytest.approx((0.15, 0.85))
    assert calibration_error(scores, to_refuse, bins=2) == pytest.approx(0.15)


def test_rows_of_equal_score_share_a_bin() -> None:
    scores = np.array([0.0] * 7 + [1.0] * 3)

    assert [entry.total for entry in reliability(scores, scores > 0, bins=5)] == [7, 3]
    assert [entry.total for entry in reliability(scores[:7], scores[:7] > 0, bins=5)] == [7]


def test_error_of_saturated_scores_is_finite() -> None:
    assert calibration_error(np.array([-1e5, 1e5]), np.array([True, True])) == pytest.approx(0.5)
    assert calibration_error(np.array([]), np.array([], dtype=bool)) is None


def _slow_error(scores: list[float], to_refuse: list[bool], bins: int) -> float:
    rows = sorted(zip(scores, to_refuse, strict=True))
    cuts = [number * len(rows) // bins for number in range(1, bins)]
    parts: dict[int, list[tuple[float, bool]]] = {}
    for score, hit in rows:
        last = max(at for at, (other, _) in enumerate(rows) if other == score)
        parts.setdefault(sum(cut <= last for cut in cuts), []).append((score, hit))
    error = 0.0
    for part in parts.values():
        predicted = sum(1 / (1 + math.exp(-score)) for score, _ in part) / len(part)
        error += len(part) / len(rows) * abs(predicted - sum(hit for _, hit in part) / len(part))
    return error


@pytest.mark.parametrize("size", [1, 14, 15, 16, 97])
def test_error_equals_a_slow_reference_with_many_ties(size: int) -> None:
    rng = np.random.default_rng(size)
    scores = rng.integers(-4, 5, size=size) / 2.0
    to_refuse = rng.random(size) < 0.5

    wanted = _slow_error(scores.tolist(), to_refuse.tolist(), 15)

    assert calibration_error(scores, to_refuse) == pytest.approx(wanted)


def test_score_is_the_log_odds_of_refusing_at_all() -> None:
    scores = refusal_scores(np.array([[0.0, 0.0], [-1000.0, -1000.0], [1000.0, 0.0]]))

    assert scores == pytest.approx([math.log(2), -1000 + math.log(2), 1000])


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    # Scores 3, 1 to refuse and 2, 1, 0 to answer: right are 3 + 1 and a tie of a half, of 6.
    margins = np.array([[3.0], [1.0], [2.0], [1.0], [0.0]])

    assert refusal_auc(margins, [True, True, False, False, False]) == pytest.approx(4.5 / 6)


def test_auc_of_one_sort_of_rows_is_unknown() -> None:
    assert refusal_auc(np.array([[1.0], [2.0]]), [True, True]) is None
