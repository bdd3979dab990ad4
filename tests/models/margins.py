"""Calibrations made of random numbers, for tests."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from models.calibration import Calibration, CalibrationInfo
from models.hashes import Hashes

NAMES = ("humanizing", "incomplete", "indeterminate", "safety", "unsupported")
HASHES = Hashes(weights="a" * 64, template="b" * 64, tokenizer="c" * 64)


def info(names: Sequence[str], name: str = "default") -> CalibrationInfo:
    return CalibrationInfo(
        name=name,
        created=datetime(2026, 11, 1, tzinfo=UTC),
        categories=tuple(names),
        hashes=HASHES,
        data_sha256={"calibration.jsonl": "d" * 64},
        seeds={"shuffle": 7},
        rheostat="0.1.0",
    )


def calibration_of(
    margins: npt.ArrayLike,
    category: Sequence[int] | npt.NDArray[np.int64],
    log_normaliser: npt.ArrayLike | None = None,
) -> Calibration:
    """Where no normaliser is given the control tokens are the whole vocabulary."""
    values = np.asarray(margins, dtype=np.float32)
    if log_normaliser is None:
        log_normaliser = np.log1p(np.exp(values.astype(np.float64)).sum(axis=1))
    return Calibration(
        margins=values,
        log_normaliser=np.asarray(log_normaliser, dtype=np.float32),
        category=np.asarray(category, dtype=np.int64),
        info=info(NAMES[: values.shape[1]]),
    )


def random_calibration(
    seed: int,
    *,
    k: int = 5,
    prompts: int = 120,
    benign: int = 300,
    apart: float = 4.0,
    spread: float = 2.0,
    rounded: int | None = None,
) -> Calibration:
    """Margins near 0 for a prompt's own token and ``apart`` below for all others.

    Args:
        seed: Of the generator.
        k: Number of categories.
        prompts: Of each category.
        benign: Number of benign prompts.
        apart: Distance of the means.
        spread: Standard deviation, of a part shared by all tokens and again of each token's own.
        rounded: Decimal places, to make ties.
    """
    rng = np.random.default_rng(seed)
    category = np.repeat(np.arange(-1, k), [benign] + [prompts] * k)
    margins = rng.normal(-apart, spread, (len(category), k))
    margins += rng.normal(0.0, spread / 2, (len(category), 1))
    own = np.flatnonzero(category >= 0)
    margins[own, category[own]] += apart
    if rounded is not None:
        margins = margins.round(rounded)
    order = rng.permutation(len(category))
    margins, category = margins[order].astype(np.float32), category[order]
    # Words of the vocabulary that are no control tokens: between nothing and half of the mass.
    rest = rng.uniform(0.0, 1.0, len(category))
    log_normaliser = np.log1p(np.exp(margins.astype(np.float64)).sum(axis=1)) + rest * np.log(2)
    return calibration_of(margins, category, log_normaliser)


def slow_share(rows: Sequence[Sequence[float]], bias: Sequence[float]) -> float:
    """One prompt at a time, as DESIGN says it: refused if any category's own rule holds."""
    refused = sum(any(m >= -b for m, b in zip(row, bias, strict=True)) for row in rows)
    return refused / len(rows)


def rows_of(calibration: Calibration, category: int) -> list[list[float]]:
    rows: list[list[float]] = calibration.margins[calibration.category == category].tolist()
    return rows
