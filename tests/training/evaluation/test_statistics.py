import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

from training.evaluation.statistics import (
    RESAMPLES,
    Resamples,
    auc,
    binned_error,
    bootstrapped,
    counted,
    f1,
    mean,
    missing,
    of_all,
    wilson,
)
from training.measure.metrics import calibration_error, equal_bins, refusal_probability

RNG = np.random.default_rng(0)
SCORES = RNG.integers(-5, 6, size=80).astype(np.float64)  # many ties
POSITIVE = RNG.random(80) < 0.4
WEIGHTS = RNG.multinomial(80, np.full(80, 1 / 80), size=3).astype(np.float64)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (3, 8), (1, 1000), (999, 1000)])
def test_wilson_interval_is_scipy_s(hits: int, n: int) -> None:
    interval = binomtest(hits, n).proportion_ci(method="wilson")

    assert wilson(hits, n) == pytest.approx((interval.low, interval.high))


def test_nothing_to_count_is_no_zero() -> None:
    found = counted(0, 0, "no prompt is benign")

    assert found == missing("no prompt is benign")
    assert (found.value, found.low, found.n, found.reason) == (None, None, 0, "no prompt is benign")


def test_weighted_auc_is_scikit_learn_s() -> None:
    found = auc(SCORES, POSITIVE)(WEIGHTS)

    assert found == pytest.approx(
        [roc_auc_score(POSITIVE, SCORES, sample_weight=weights) for weights in WEIGHTS]
    )


def test_weighted_f1_is_scikit_learn_s() -> None:
    found = f1(SCORES > 0, POSITIVE)(WEIGHTS)

    assert found == pytest.approx(
        [f1_score(POSITIVE, SCORES > 0, sample_weight=weights) for weights in WEIGHTS]
    )


def test_binned_error_is_the_calibration_error() -> None:
    gaps = refusal_probability(SCORES) - POSITIVE

    found = of_all(binned_error(gaps, equal_bins(SCORES)), 80)

    assert found == pytest.approx(calibration_error(SCORES, POSITIVE))


def test_mean_leaves_out_prompts_without_a_value() -> None:
    assert of_all(mean(np.array([1.0, np.nan, 0.0, 1.0])), 4) == pytest.approx(2 / 3)


def test_figure_that_a_resample_lacks_is_nan() -> None:
    assert np.isnan(auc(SCORES, POSITIVE)(np.where(POSITIVE, 0.0, 1.0)[None])).all()


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = RNG.random(400)
    half = 1.96 * values.std() / 20

    found = bootstrapped(mean(values), Resamples(400, seed=0))

    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.2 * half)


def test_perfect_figure_has_wilson_s_interval_of_the_rarer_sort() -> None:
    positive = np.arange(50) < 10

    found = bootstrapped(auc(positive.astype(float), positive), Resamples(50, 0), rarer=10)

    assert (found.value, found.low, found.high) == (1.0, *wilson(10, 10))


def test_centred_interval_holds_its_value() -> None:
    # Two hundred calibrated prompts: resampling only makes the error larger.
    scores = np.linspace(-3, 3, 200)
    happened = np.random.default_rng(1).random(200) < refusal_probability(scores)
    figure = binned_error(refusal_probability(scores) - happened, equal_bins(scores))

    found = bootstrapped(figure, Resamples(200, 0), centred=True)

    assert found.low is not None
    assert found.value is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high


def test_resamples_are_drawn_in_chunks_of_one_seed() -> None:
    whole = Resamples(9000, seed=3)
    sums = whole.of(lambda weights: weights.sum(axis=1))

    assert sums.tolist() == [9000.0] * RESAMPLES
    assert np.array_equal(
        whole.of(lambda weights: weights[:, 0]),
        Resamples(9000, seed=3).of(lambda weights: weights[:, 0]),
    )
