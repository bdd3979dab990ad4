from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from models.calibration import Calibration, CalibrationInfo
from models.errors import ConfigError, EvaluationError
from models.hashes import Hashes
from models.histogram import BINS, EDGES, PolicyMargins, RecordedMargins, histogram, save_margins
from training.calibration.drift import Reference, check, check_recorded, estimate_mix, reference

NAMES = ("safety", "humanizing")
MEANS = {0: (3.0, -3.0), 1: (-4.0, 2.0), -1: (-5.0, -5.0)}

Floats = NDArray[np.float64]


def _prompts(
    rng: np.random.Generator, sizes: dict[int, int], shift: float = 0.0
) -> tuple[Floats, NDArray[np.int64]]:
    labels = np.repeat(list(sizes), list(sizes.values()))
    means = np.array([MEANS[label] for label in labels])
    return rng.normal(means + shift, 1.5), labels


def _counts(margins: Floats) -> dict[str, Sequence[int]]:
    return {name: histogram(margins[:, at]).tolist() for at, name in enumerate(NAMES)}


def _calibrated(seed: int = 0) -> Reference:
    return reference(*_prompts(np.random.default_rng(seed), {0: 400, 1: 400, -1: 800}), NAMES)


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

    report = check(calibrated, _counts(theirs), alpha=0.05, tolerance=0)

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
    traffic, _ = _prompts(np.random.default_rng(2), {0: 100, 1: 400, -1: 9500})

    mix = estimate_mix(_calibrated(), np.array(list(_counts(traffic).values())))

    assert mix == pytest.approx([0.01, 0.04, 0.95], abs=0.015)
    assert mix.sum() == pytest.approx(1)


def test_another_mix_is_no_drift() -> None:
    traffic, _ = _prompts(np.random.default_rng(3), {0: 20, 1: 80, -1: 1900})

    report = check(_calibrated(), _counts(traffic))

    assert not report.drifted
    assert report.rows == 2000
    assert report.mix["benign"] > 0.9


def test_shifted_margins_are_drift_and_name_the_category() -> None:
    traffic, _ = _prompts(np.random.default_rng(4), {0: 500, 1: 500, -1: 1000})
    traffic[:, 1] += 1.0

    report = check(_calibrated(), _counts(traffic))

    worst = max(report.categories, key=lambda test: test.distance)
    assert worst.drifted
    assert worst.category == "humanizing"
    assert "drifted" in str(report.table().title)


def test_false_alarms_are_as_rare_as_promised() -> None:
    # 100 draws of traffic with a mix of its own, at alpha 5 %: more than 10 alarms would have a
    # chance of 1.1 % if alarms came in 5 % of the draws.
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(100):
        calibrated = reference(*_prompts(rng, {0: 150, 1: 150, -1: 300}), NAMES)
        traffic, _ = _prompts(rng, {0: 50, 1: 150, -1: int(rng.integers(100, 900))})
        alarms += check(calibrated, _counts(traffic), alpha=0.05, tolerance=0).drifted
    assert alarms <= 10


def test_tolerance_silences_differences_that_do_not_matter() -> None:
    rng = np.random.default_rng(6)
    calibrated = reference(*_prompts(rng, {0: 20_000, 1: 20_000, -1: 20_000}), NAMES)
    traffic, _ = _prompts(rng, {0: 20_000, 1: 20_000, -1: 20_000}, shift=0.1)

    assert check(calibrated, _counts(traffic), tolerance=0).drifted
    assert not check(calibrated, _counts(traffic), tolerance=0.05).drifted


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="nothing to check"):
        check(_calibrated(), {name: [0] * BINS for name in NAMES})


def _calibration() -> Calibration:
    margins, category = _prompts(np.random.default_rng(0), {0: 400, 1: 400, -1: 800})
    info = CalibrationInfo(
        name="default",
        created=datetime(2026, 11, 1, tzinfo=UTC),
        categories=NAMES,
        hashes=Hashes(weights="aa" * 32, template="bb" * 32, tokenizer="cc" * 32),
        rheostat="0",
    )
    log_normaliser = np.logaddexp.reduce(np.pad(margins, ((0, 0), (0, 1))), axis=1) + 0.1
    return Calibration(margins, log_normaliser, category, info)  # type: ignore[arg-type]


def _file(tmp_path: Path, margins: dict[str, Floats], weights: str | None = None) -> Path:
    policies = {
        name: PolicyMargins(rows=len(rows), counts={k: tuple(v) for k, v in _counts(rows).items()})
        for name, rows in margins.items()
    }
    path = tmp_path / "margins.json"
    recorded = RecordedMargins(since="s", until="u", weights_sha256=weights, policies=policies)
    save_margins(path, recorded)
    return path


def test_recorded_policies_are_checked_together_or_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    fits, _ = _prompts(rng, {0: 500, 1: 500, -1: 500})
    drifted, _ = _prompts(rng, {0: 500, 1: 500, -1: 500}, shift=2.0)
    path = _file(tmp_path, {"default": fits, "kiosk": drifted}, "aa" * 32)

    assert check_recorded(_calibration(), path).rows == 3000
    assert not check_recorded(_calibration(), path, policy="default").drifted
    assert check_recorded(_calibration(), path, policy="kiosk").drifted


def test_unknown_policy_other_weights_other_categories_are_errors(tmp_path: Path) -> None:
    rows, _ = _prompts(np.random.default_rng(8), {0: 5, 1: 5, -1: 5})

    with pytest.raises(ConfigError, match="policy 'kiosk' is not in it; it has default"):
        check_recorded(_calibration(), _file(tmp_path, {"default": rows}), policy="kiosk")
    with pytest.raises(ConfigError, match=r"weights dddddddddddd, .* measured with aaaaaaaaaaaa"):
        check_recorded(_calibration(), _file(tmp_path, {"default": rows}, "dd" * 32))
    other = PolicyMargins(rows=0, counts={"unsupported": (0,) * BINS})
    path = tmp_path / "other.json"
    save_margins(path, RecordedMargins(since="s", until="u", policies={"default": other}))
    with pytest.raises(ConfigError, match="has the categories unsupported, the calibration safety"):
        check_recorded(_calibration(), path)


def test_recording_without_policies_has_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nothing to check"):
        check_recorded(_calibration(), _file(tmp_path, {}))
