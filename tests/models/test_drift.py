import numpy as np
import pytest
from scipy.stats import ks_2samp

from models.drift import Reference, check, estimate_mix, reference
from models.errors import EvaluationError
from models.histogram import BINS, EDGES
from tests.models.drifting import NAMES, counts, prompts


def _calibrated(seed: int = 0) -> Reference:
    return reference(*prompts(np.random.default_rng(seed), {0: 400, 1: 400, -1: 800}), NAMES)


def test_reference_bins_each_group() -> None:
    margins = np.array([[0.1, -30.0], [0.1, 30.0], [-1.0, 0.0]])

    binned = reference(margins, np.array([0, -1, 0]), NAMES)

    assert binned.groups == ("safety", "benign")
    assert binned.sizes.tolist() == [2, 1]
    assert binned.counts.shape == (2, 2, BINS)
    assert binned.counts[0, 0, [77, 81]].tolist() == [1, 1]
    assert binned.counts[1, 1, BINS - 1] == 1


def test_statistic_and_p_value_are_kolmogorov_and_smirnovs() -> None:
    # All margins on bin edges, so that binning loses nothing; one group, so that the mix is known.
    rng = np.random.default_rng(1)
    ours = rng.choice(EDGES[60:100], size=(300, 2))
    theirs = rng.choice(EDGES[64:104], size=(200, 2))
    calibrated = reference(ours, np.zeros(300, dtype=np.int64), NAMES)

    report = check(calibrated, counts(theirs), alpha=0.05, tolerance=0)

    for at, test in enumerate(report.categories):
        wanted = ks_2samp(ours[:, at], theirs[:, at], method="asymp")
        assert test.distance == pytest.approx(wanted.statistic)
        # The asymptotic tail: scipy corrects it for small samples, in the third decimal.
        assert test.p_value == pytest.approx(wanted.pvalue, rel=0.2)
        assert test.drifted == (test.p_value < 0.05 / 2)
        # Where the statistic is attained: the share below that edge, counted plainly.
        below = [float((margins[:, at] < test.at).mean()) for margins in (ours, theirs)]
        assert abs(below[0] - below[1]) == pytest.approx(test.distance)


def test_mix_is_found() -> None:
    traffic, _ = prompts(np.random.default_rng(2), {0: 100, 1: 400, -1: 9500})

    mix = estimate_mix(_calibrated(), np.array(list(counts(traffic).values())))

    assert mix == pytest.approx([0.01, 0.04, 0.95], abs=0.015)
    assert mix.sum() == pytest.approx(1)


def test_another_mix_is_no_drift() -> None:
    traffic, _ = prompts(np.random.default_rng(3), {0: 20, 1: 80, -1: 1900})

    report = check(_calibrated(), counts(traffic))

    assert not report.drifted
    assert report.rows == 2000
    assert report.mix["benign"] > 0.9


def test_shifted_margins_are_drift_and_name_the_category() -> None:
    traffic, _ = prompts(np.random.default_rng(4), {0: 500, 1: 500, -1: 1000})
    traffic[:, 1] += 1.0

    report = check(_calibrated(), counts(traffic))

    worst = max(report.categories, key=lambda test: test.distance)
    assert worst.drifted
    assert worst.category == "humanizing"
    assert report.drifted


def test_false_alarms_are_as_rare_as_promised() -> None:
    # 100 draws of traffic with a mix of its own, at alpha 5 %: more than 10 alarms would have a
    # chance of 1.1 % if alarms came in 5 % of the draws.
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(100):
        calibrated = reference(*prompts(rng, {0: 150, 1: 150, -1: 300}), NAMES)
        traffic, _ = prompts(rng, {0: 50, 1: 150, -1: int(rng.integers(100, 900))})
        alarms += check(calibrated, counts(traffic), alpha=0.05, tolerance=0).drifted
    assert alarms <= 10


def test_tolerance_silences_differences_that_do_not_matter() -> None:
    rng = np.random.default_rng(6)
    calibrated = reference(*prompts(rng, {0: 20_000, 1: 20_000, -1: 20_000}), NAMES)
    traffic, _ = prompts(rng, {0: 20_000, 1: 20_000, -1: 20_000}, shift=0.1)

    assert check(calibrated, counts(traffic), tolerance=0).drifted
    assert not check(calibrated, counts(traffic), tolerance=0.05).drifted


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="nothing to check"):
        check(_calibrated(), {name: [0] * BINS for name in NAMES})
