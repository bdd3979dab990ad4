"""Three ways to fit the maps that make margins honest; the maps are those of models.margin_maps."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.margin_maps import MarginMap
from training.measure.metrics import Flags, Floats, refusal_probability
from training.measure.report import refusal_scores

Integers = NDArray[np.int64]

TEMPERATURES = (0.05, 20.0)


def apply_maps(maps: Sequence[MarginMap], margins: Floats) -> Floats:
    """Returns `[n, k]` margins, each column through its own map."""
    return np.column_stack([entry(margins[:, at]) for at, entry in enumerate(maps)])


def fit_temperature(margins: Floats, columns: Integers) -> tuple[MarginMap, ...]:
    """Returns the division of all margins by the one temperature with the least log loss.

    Args:
        margins: `[n, k]`.
        columns: `[n]` the right category's column, `k` where the row is to be answered.
    """
    from scipy.optimize import minimize_scalar

    to_refuse = columns < margins.shape[1]
    found = minimize_scalar(
        lambda log_t: log_losses(refusal_scores(margins / np.exp(log_t)), to_refuse).mean(),
        bounds=tuple(np.log(TEMPERATURES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    k: int = margins.shape[1]
    return (_scaling(float(np.exp(found.x))),) * k


def fit_temperatures(margins: Floats, columns: Integers) -> tuple[MarginMap, ...]:
    """Returns the division of each category's margins by its own temperature.

    Where a category says nothing about its temperature it stays at the common one.

    Args:
        margins: As in `fit_temperature`.
        columns: As in `fit_temperature`.
    """
    from scipy.optimize import minimize

    to_refuse = columns < margins.shape[1]
    common = -np.log(fit_temperature(margins, columns)[0].slope_above)

    def objective(log_t: Floats) -> tuple[float, Floats]:
        scaled = margins / np.exp(log_t)
        scores = refusal_scores(scaled)
        outer = (refusal_probability(scores) - to_refuse)[:, None]
        gradient = -(outer * np.exp(scaled - scores[:, None]) * scaled).mean(axis=0)
        return float(log_losses(scores, to_refuse).mean()), gradient

    found = minimize(
        objective,
        np.full(margins.shape[1], common),
        jac=True,
        method="L-BFGS-B",
        bounds=[tuple(np.log(TEMPERATURES))] * margins.shape[1],
    )
    return tuple(_scaling(float(t)) for t in np.exp(found.x))


def fit_isotonic(margins: Floats, columns: Integers) -> tuple[MarginMap, ...]:
    """Returns, for each category, the map to the log-odds of its rows against those to answer.

    A margin is the log-odds of one category against responding, so the rows of other categories
    have no say in its map. Beyond the outermost blocks the map goes on with slope 1. A category
    without rows of its own keeps its margins.

    Args:
        margins: As in `fit_temperature`.
        columns: As in `fit_temperature`.
    """
    k = margins.shape[1]
    benign = columns == k
    return tuple(
        _isotonic(margins[own | benign, at], own[own | benign]) if own.any() else MarginMap()
        for at, own in ((at, columns == at) for at in range(k))
    )


def log_losses(scores: Floats, to_refuse: Flags) -> Floats:
    """Returns the `[n]` negative log-likelihoods of "to be refused or not", in nats."""
    losses: Floats = np.logaddexp(0, np.where(to_refuse, -scores, scores))
    return losses


def _scaling(temperature: float) -> MarginMap:
    return MarginMap(slope_below=1 / temperature, slope_above=1 / temperature)


def _isotonic(margins: Floats, hits: Flags) -> MarginMap:
    from scipy.special import logit
    from sklearn.isotonic import IsotonicRegression

    # Half a hit below all and half a miss above all: finitely many rows show no certainty.
    x = np.append(margins, (margins.min(), margins.max()))
    y = np.append(hits, (True, False)).astype(np.float64)
    weight = np.append(np.ones(len(margins)), (0.5, 0.5))
    fitted = IsotonicRegression().fit_transform(x, y, sample_weight=weight)
    # Equal but for rounding is one block.
    shares, block = np.unique(np.round(fitted, 12), return_inverse=True)
    centres = np.bincount(block, weight * x) / np.bincount(block, weight)
    return MarginMap(tuple(zip(centres.tolist(), logit(shares).tolist(), strict=True)))
