"""``rheostat calibrate --check``: a file of recorded margins against a calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.calibration import Calibration
from models.drift import Counts, DriftReport, check, reference
from models.errors import ConfigError
from models.histogram import BINS, RecordedMargins, load_margins

if TYPE_CHECKING:
    from rich.table import Table


def check_recorded(
    calibration: Calibration, path: Path, *, policy: str | None = None
) -> DriftReport:
    """Tests a calibration against a file of margins that a server recorded.

    Args:
        path: What `models.histogram.save_margins` wrote.

    Raises:
        ConfigError: The file is of another form, other weights or other categories, or the policy
            is not in it.
    """
    recorded = load_margins(path)
    measured = calibration.info.hashes.weights
    if recorded.weights_sha256 not in (None, measured):
        raise ConfigError(
            f"{path} was recorded with the weights {str(recorded.weights_sha256)[:12]}, the "
            f"calibration {calibration.info.name!r} measured with {measured[:12]}"
        )
    observed = _observed(recorded, path, policy, calibration.names)
    calibrated = reference(calibration.margins, calibration.category, calibration.names)
    return check(calibrated, observed)


def _observed(
    recorded: RecordedMargins, path: Path, policy: str | None, names: Sequence[str]
) -> dict[str, Counts]:
    if policy is not None and policy not in recorded.policies:
        known = ", ".join(recorded.policies) or "none"
        raise ConfigError(f"{path}: the policy {policy!r} is not in it; it has {known}")
    chosen = [recorded.policies[policy]] if policy else list(recorded.policies.values())
    for entry in chosen:
        if set(entry.counts) != set(names):
            raise ConfigError(
                f"{path}: has the categories {', '.join(entry.counts)}, the calibration "
                f"{', '.join(names)}"
            )
    return {
        name: np.array([entry.counts[name] for entry in chosen], dtype=np.int64)
        .reshape(-1, BINS)
        .sum(axis=0)
        for name in names
    }


def drift_table(report: DriftReport) -> "Table":
    """Returns the report as a table for the terminal."""
    from rich.table import Table

    verdict = "drifted" if report.drifted else "fits"
    shares = ", ".join(f"{group} {share:.0%}" for group, share in report.mix.items())
    table = Table(
        title=f"{report.rows} recorded decisions: the calibration {verdict}",
        caption=f"estimated mix: {shares}",
    )
    for heading in ("margin of", "distance", "at", "alarm above", "p", "verdict"):
        table.add_column(heading, justify="left" if heading == "margin of" else "right")
    for test in report.categories:
        table.add_row(
            test.category,
            f"{test.distance:.1%}",
            f"{test.at:+g}",
            f"{test.limit:.1%}",
            f"{test.p_value:.2g}",
            "drifted" if test.drifted else "fits",
        )
    return table
