import re
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.calibration import Calibration, CalibrationInfo
from models.hashes import Hashes
from training.calibration.figures import figures, save_figures
from training.calibration.report import summary


def _calibration(
    names: tuple[str, ...] = ("safety", "humanizing"), own: int = 40, benign: int = 100
) -> Calibration:
    """Own margins -2 .. 2, others' -9; benign -8 .. -4: each 5 % of a rate is 2 prompts of 40."""
    rng = np.random.default_rng(0)
    category = np.repeat([*range(len(names)), -1], [*[own] * len(names), benign])
    margins = np.full((len(category), len(names)), -9.0)
    for at in range(len(names)):
        margins[category == at, at] = np.linspace(-2, 2, own)
    margins[category == -1] = rng.uniform(-8, -4, (benign, len(names)))
    info = CalibrationInfo(
        name="default",
        created=datetime(2026, 11, 1, tzinfo=UTC),
        categories=names,
        hashes=Hashes(weights="aa" * 32, template="bb" * 32, tokenizer="cc" * 32),
        data_sha256={"<b>.jsonl": "dd" * 32},
        seeds={"sample": 7},
        rheostat="0.1.0",
    )
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.full(len(category), 5.0, dtype=np.float32),
        category=category,
        info=info,
    )


def test_calibration_without_benign_prompts_has_no_trade_off() -> None:
    assert list(figures(_calibration(benign=0))) == ["curves", "margins"]


def test_single_token_checkpoint_is_drawn(tmp_path: Path) -> None:
    calibration = _calibration(names=("refuse",))

    written = save_figures(calibration, tmp_path)

    assert [path.name for path in written] == [
        "default-curves.png",
        "default-trade-off.png",
        "default-reliability.png",
        "default-margins.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_curve_passes_through_what_the_margins_say() -> None:
    axis = figures(_calibration())["curves"].axes[0]
    own = next(line for line in axis.get_lines() if line.get_label() == "its own prompts")
    biases, rates = (np.asarray(values, dtype=float) for values in own.get_data())

    at_zero = rates[abs(biases).argmin()]
    assert at_zero == pytest.approx(50.0)
    assert (np.diff(rates) >= 0).all()
    assert rates[biases < -2.01].max() == 0
    assert rates[biases > 2.01].min() == 100


def test_summary_counts_as_trained() -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(summary(_calibration()))
    text = console.export_text()

    assert re.search(r"safety\s.*40\s.*50\.0%.*33\.8 to 66\.2.*0\.0%.*0\.0 to 3\.6", text)
    assert "100 benign prompts" in text
