from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from models.calibration import Calibration, CalibrationInfo
from models.errors import ConfigError, EvaluationError
from models.hashes import Hashes
from models.histogram import BINS, PolicyMargins, RecordedMargins, save_margins
from tests.models.drifting import NAMES, Floats, counts, prompts
from training.calibration.drift import check_recorded, drift_table


def _calibration() -> Calibration:
    margins, category = prompts(np.random.default_rng(0), {0: 400, 1: 400, -1: 800})
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
        name: PolicyMargins(rows=len(rows), counts={k: tuple(v) for k, v in counts(rows).items()})
        for name, rows in margins.items()
    }
    path = tmp_path / "margins.json"
    recorded = RecordedMargins(since="s", until="u", weights_sha256=weights, policies=policies)
    save_margins(path, recorded)
    return path


def test_recorded_policies_are_checked_together_or_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    fits, _ = prompts(rng, {0: 500, 1: 500, -1: 500})
    drifted, _ = prompts(rng, {0: 500, 1: 500, -1: 500}, shift=2.0)
    path = _file(tmp_path, {"default": fits, "kiosk": drifted}, "aa" * 32)

    assert check_recorded(_calibration(), path).rows == 3000
    assert not check_recorded(_calibration(), path, policy="default").drifted
    drift = check_recorded(_calibration(), path, policy="kiosk")
    assert drift.drifted
    assert "drifted" in str(drift_table(drift).title)


def test_unknown_policy_other_weights_other_categories_are_errors(tmp_path: Path) -> None:
    rows, _ = prompts(np.random.default_rng(8), {0: 5, 1: 5, -1: 5})

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
