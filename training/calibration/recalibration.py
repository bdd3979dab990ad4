"""Makes p(refuse) mean what it says, where that helps on rows that were not fitted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from models.calibration import Calibration
from models.calibration import Recalibration as KeptRecalibration
from models.errors import EvaluationError
from models.margin_maps import MarginMap
from training.calibration.margin_maps import (
    Integers,
    apply_maps,
    fit_isotonic,
    fit_temperature,
    fit_temperatures,
    log_losses,
)
from training.measure.metrics import (
    Flags,
    Floats,
    calibration_errors,
    refusal_probability,
    truth_columns,
)
from training.measure.report import refusal_scores

Method = Literal["off", "temperature", "temperature_per_category", "isotonic"]

Fit = Callable[[Floats, Integers], tuple[MarginMap, ...]]

RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100
CONFIDENCE = 0.95
LEAST_ROWS = 20
SEED = 0


@dataclass(frozen=True)
class Scores:
    """How good p(refuse) is; less is better.

    Attributes:
        log_loss: Mean negative log-likelihood of "to be refused or not", in nats.
        brier: Mean squared distance of p(refuse) from it.
        calibration_error: See `training.measure.metrics.calibration_error`.
    """

    log_loss: float
    brier: float
    calibration_error: float


class Improvement(NamedTuple):
    """By how much a score falls on held-out rows.

    Attributes:
        value: The fall; below 0 the score rises.
        low: Lower end of its interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """A way to recalibrate, and what it does to held-out rows.

    Attributes:
        scores: After it.
        improvement: By score, against the margins as they are, with a bootstrap interval of
            `CONFIDENCE` for all candidates together.
        maps: By category, in order, fitted on all rows.
    """

    scores: Scores
    improvement: Mapping[str, Improvement]
    maps: tuple[MarginMap, ...]

    @property
    def helps(self) -> bool:
        """Whether the log loss surely falls, and no other score surely rises."""
        others = (entry for name, entry in self.improvement.items() if name != "log_loss")
        return self.improvement["log_loss"].low > 0 and all(entry.high >= 0 for entry in others)


@dataclass(frozen=True)
class Recalibration:
    """What was found, and the maps to use.

    Attributes:
        method: The candidate that helps most; `off` where none surely helps.
        maps: By category, in order: those of `method`.
        names: The categories.
        uncalibrated: Scores of the margins as they are.
        candidates: By method.
        rows: How many rows there were.
    """

    method: Method
    maps: tuple[MarginMap, ...]
    names: tuple[str, ...]
    uncalibrated: Scores
    candidates: Mapping[Method, Candidate]
    rows: int

    def apply(self, margins: Floats) -> Floats:
        """Returns `[n, k]` recalibrated margins of `[n, k]` margins."""
        return apply_maps(self.maps, margins)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {
            **asdict(self),
            "maps": {
                name: asdict(entry) for name, entry in zip(self.names, self.maps, strict=True)
            },
            "candidates": {
                method: {
                    "scores": asdict(candidate.scores),
                    "improvement": {k: v._asdict() for k, v in candidate.improvement.items()},
                    "helps": candidate.helps,
                }
                for method, candidate in self.candidates.items()
            },
        }

    def lines(self) -> list[str]:
        """Returns what a person wants to know: a line for each candidate, and the choice."""
        before = self.uncalibrated
        told = [
            f"as trained: log loss {before.log_loss:.4f}, Brier {before.brier:.4f}, calibration "
            f"error {before.calibration_error:.4f} on {self.rows} rows"
        ]
        for method, candidate in self.candidates.items():
            gain = candidate.improvement["log_loss"]
            told.append(
                f"{method}: log loss {candidate.scores.log_loss:.4f}, Brier "
                f"{candidate.scores.brier:.4f}, calibration error "
                f"{candidate.scores.calibration_error:.4f}; log loss falls by {gain.value:.4f} "
                f"({gain.low:.4f} to {gain.high:.4f}): {'helps' if candidate.helps else 'no help'}"
            )
        return [*told, f"recalibration: {self.method}"]


def recalibration_report(
    margins: Floats, truth: Sequence[str | None], names: Sequence[str], seed: int
) -> Recalibration:
    """Scores every way to recalibrate on rows that it was not fitted on, and chooses.

    The rows are halved, each category evenly; each half is scored with the maps that the other
    taught. What is fitted and scored is p(refuse), all refusals together, so the result holds for
    traffic that is to be refused about as often as these rows. Chosen is the candidate with the
    least log loss among those that surely help.

    Source: temperature scaling is that of Guo et al., ICML 2017 (arXiv 1706.04599, section 4.2),
    and per category their vector scaling without a shift. The isotonic map is that of Zadrozny and
    Elkan, KDD 2002, made strictly increasing by lines between the centres of its blocks, as Oron
    and Flournoy do (Statistics in Biopharmaceutical Research 9, 2017).

    Args:
        margins: `[n, k]`, finite.
        truth: `[n]` the category a row should be refused for, or None.
        names: The `k` categories.
        seed: Seed of the halves and of the bootstrap.

    Raises:
        ValueError: Shapes do not fit together, a margin is not finite, a category is unknown.
        EvaluationError: There are not 20 rows to refuse and 20 to answer.
    """
    if margins.shape != (len(truth), len(names)) or not np.isfinite(margins).all():
        raise ValueError(
            f"finite margins [{len(truth)}, {len(names)}] wanted, got {list(margins.shape)}"
        )
    columns = truth_columns(truth, names)
    _check_both_sorts(columns, len(names))
    rng = np.random.default_rng(seed)
    half = _half(columns, rng)
    to_refuse = columns < len(names)
    resamples = _resamples(len(columns), rng)
    before = _RowScores(margins, to_refuse)
    candidates: dict[Method, Candidate] = {}
    for method, fit in FITS.items():
        after = _RowScores(_held_out(fit, margins, columns, half), to_refuse)
        candidates[method] = Candidate(
            after.scores(), _improvement(before, after, resamples), fit(margins, columns)
        )
    method = _best(candidates)
    maps = (MarginMap(),) * len(names) if method == "off" else candidates[method].maps
    return Recalibration(method, maps, tuple(names), before.scores(), candidates, len(columns))


def recalibration_of(calibration: Calibration) -> Recalibration:
    """Tries every way to recalibrate on a calibration's own prompts.

    Raises:
        EvaluationError: There are not 20 rows to refuse and 20 to answer.
    """
    truth = [(*calibration.names, None)[label] for label in calibration.category]
    margins = calibration.margins.astype(np.float64)
    return recalibration_report(margins, truth, calibration.names, SEED)


def recalibrated(calibration: Calibration) -> Calibration:
    """Returns the calibration with the maps that help most; as it is where none surely helps."""
    try:
        found = recalibration_of(calibration)
    except EvaluationError:  # too few benign prompts to tell
        return calibration
    if found.method == "off":
        return calibration
    maps = dict(zip(found.names, found.maps, strict=True))
    kept = KeptRecalibration(method=found.method, maps=maps)
    return replace(calibration, info=calibration.info.model_copy(update={"recalibration": kept}))


FITS: Mapping[Method, Fit] = {
    "temperature": fit_temperature,
    "temperature_per_category": fit_temperatures,
    "isotonic": fit_isotonic,
}


def _held_out(fit: Fit, margins: Floats, columns: Integers, half: Flags) -> Floats:
    """Returns the margins, those of each half through the maps that the other half taught."""
    mapped = np.empty_like(margins)
    for part in (half, ~half):
        mapped[~part] = apply_maps(fit(margins[part], columns[part]), margins[~part])
    return mapped


class _RowScores:
    """p(refuse) of rows, and how good it is, also in resamples of them."""

    def __init__(self, margins: Floats, to_refuse: Flags) -> None:
        self._scores = refusal_scores(margins)
        self._to_refuse = to_refuse
        squares = (refusal_probability(self._scores) - to_refuse) ** 2
        self._terms = np.column_stack((log_losses(self._scores, to_refuse), squares))

    def means(self, counts: Integers) -> Floats:
        """Returns `[resamples, 3]` scores of `[resamples, n]` counts of rows."""
        means = counts @ self._terms / counts.sum(axis=1, keepdims=True)
        return np.column_stack((means, calibration_errors(self._scores, self._to_refuse, counts)))

    def scores(self) -> Scores:
        return Scores(*self.means(np.ones((1, len(self._terms)), dtype=np.int64))[0].tolist())


def _improvement(
    before: _RowScores, after: _RowScores, resamples: Sequence[Integers]
) -> dict[str, Improvement]:
    drawn = np.concatenate([before.means(counts) - after.means(counts) for counts in resamples])
    # Bonferroni: the best of several candidates is looked at.
    tail = (1 - CONFIDENCE) / 2 / len(FITS)
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    old, new = asdict(before.scores()), asdict(after.scores())
    return {
        name: Improvement(old[name] - new[name], float(low[at]), float(high[at]))
        for at, name in enumerate(old)
    }


def _best(candidates: Mapping[Method, Candidate]) -> Method:
    helping = [method for method, candidate in candidates.items() if candidate.helps]
    return min(helping, key=lambda method: candidates[method].scores.log_loss, default="off")


def _check_both_sorts(columns: Integers, k: int) -> None:
    answers = int((columns == k).sum())
    refusals = len(columns) - answers
    if min(answers, refusals) < LEAST_ROWS:
        raise EvaluationError(
            f"recalibration needs at least {LEAST_ROWS} rows to refuse and {LEAST_ROWS} to answer, "
            f"got {refusals} and {answers}"
        )


def _half(columns: Integers, rng: np.random.Generator) -> Flags:
    """Returns which rows are fitted: every other one of each category, in random order."""
    fitted = np.zeros(len(columns), dtype=bool)
    order = rng.permutation(len(columns))
    # Counted on through the categories, so that single rows do not all fall into one half.
    by_column = order[np.argsort(columns[order], kind="stable")]
    fitted[by_column[::2]] = True
    return fitted


def _resamples(rows: int, rng: np.random.Generator) -> list[Integers]:
    """Returns how often each row is taken in each resample, `[resamples, rows]`, in portions."""
    even = np.full(rows, 1 / rows)
    return [
        rng.multinomial(rows, even, size=RESAMPLES_AT_ONCE)
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)
    ]
