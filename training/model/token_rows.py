"""Output rows of control tokens, learnt as a logistic regression on the states they are read from.

The respond token's row is zero, so a margin is one product: the row of the refusal token times the
state. There is no intercept, as output layers have none: the mean of the states is far from zero,
and a row finds its offset along it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError

Floats = NDArray[np.float64]

# Of the penalty on the rows, in units of each state's own spread; the strongest first.
STRENGTHS = tuple(float(10.0**power) for power in np.arange(0.0, -6.1, -0.5))
# Weaker penalties take longer: none is tried after so many that were worse than the best.
WORSE = 2
FOLDS = 5
STEPS = 2000
# Relative change of the loss at which L-BFGS ends: to compare strengths, and for the rows.
ROUGHLY, FINELY = 1e-6, 1e-10


class Decisions(NamedTuple):
    """What rows are learnt from.

    Attributes:
        states: `[n, width]` what the output layer reads at the decision step.
        labels: `[n]` int64 column of the right category; the number of categories for an answer.
        weights: `[n]` what each decision counts.
    """

    states: Floats
    labels: NDArray[np.int64]
    weights: Floats

    def of(self, rows: NDArray[np.bool_]) -> "Decisions":
        """Returns some of them."""
        return Decisions(self.states[rows], self.labels[rows], self.weights[rows])


class Fit(NamedTuple):
    """Rows and how they were chosen.

    Attributes:
        rows: `[k, width]` fp64, one a category.
        strength: Of the penalty.
        losses: Cross-validated mean cross-entropy in nats, by strength.
        held_out: `[n, k]` margins at that strength, each by rows that were learnt without it.
    """

    rows: Floats
    strength: float
    losses: dict[float, float]
    held_out: Floats


def fit(decisions: Decisions, categories: int, seed: int = 0) -> Fit:
    """Learns a row for each category; the strength of the penalty is chosen by cross-validation.

    Args:
        decisions: Of every category, and answers.
        categories: How many there are.
        seed: Of the folds.

    Raises:
        ConfigError: A category, or the answers, have fewer decisions than there are folds.
    """
    return _fit(decisions, np.zeros((len(decisions.labels), 0)), categories, seed)


def fit_one(decisions: Decisions, margins: Floats, seed: int = 0) -> Fit:
    """Learns the row of one more category, beside others that stay as they are.

    Args:
        decisions: Of the new category, labelled 0, and others, labelled 1. Which of the others is
            right changes nothing: their margins stay.
        margins: `[n, k]` of the categories that are there.
        seed: Of the folds.

    Raises:
        ConfigError: There are too few decisions.
    """
    return _fit(decisions, margins, 1, seed)


def _fit(decisions: Decisions, fixed: Floats, categories: int, seed: int) -> Fit:
    folds = _folds(decisions.labels, categories, seed)
    scale = decisions.states.std(axis=0)
    # A state that never changes tells nothing.
    scale = np.where(scale > 1e-6 * scale.max(), scale, np.inf)
    spread = decisions._replace(states=decisions.states / scale)
    losses, held_out = _cross_validated(spread, fixed, categories, folds)
    strength = min(losses, key=losses.__getitem__)
    start = np.zeros((categories, spread.states.shape[1]))
    return Fit(
        _minimised(spread, fixed, strength, start, FINELY) / scale, strength, losses, held_out
    )


def _cross_validated(
    decisions: Decisions, fixed: Floats, categories: int, folds: NDArray[np.int64]
) -> tuple[dict[float, float], Floats]:
    rows = [np.zeros((categories, decisions.states.shape[1])) for _ in range(FOLDS)]
    losses: dict[float, float] = {}
    margins, best = np.zeros((len(folds), categories)), np.zeros((len(folds), categories))
    for strength in STRENGTHS:
        held_out = []
        for fold in range(FOLDS):
            held = folds == fold
            learnt = decisions.of(~held)
            rows[fold] = _minimised(learnt, fixed[~held], strength, rows[fold], ROUGHLY)
            margins[held] = decisions.states[held] @ rows[fold].T
            held_out.append(_loss(rows[fold], decisions.of(held), fixed[held])[0])
        losses[strength] = float(np.mean(held_out))
        if losses[strength] == min(losses.values()):
            best = margins.copy()
        if all(loss > min(losses.values()) for loss in list(losses.values())[-WORSE:]):
            break
    return losses, best


def _folds(labels: NDArray[np.int64], categories: int, seed: int) -> NDArray[np.int64]:
    """Returns `[n]` the fold of each decision, each label spread over all of them."""
    folds = np.empty(len(labels), np.int64)
    random = np.random.default_rng(seed)
    for label in range(categories + 1):
        (members,) = np.nonzero(labels == label)
        if len(members) < FOLDS:
            raise ConfigError(
                f"train: tokens needs {FOLDS} rows of every category and {FOLDS} that are "
                f"answered, and of one there are {len(members)}"
            )
        folds[random.permutation(members)] = np.arange(len(members)) % FOLDS
    return folds


def _minimised(
    decisions: Decisions, fixed: Floats, strength: float, start: Floats, tolerance: float
) -> Floats:
    """Returns the rows `[k, width]` of least penalised loss."""
    from scipy.optimize import minimize

    def penalised(flat: Floats) -> tuple[float, Floats]:
        loss, gradient = _loss(flat.reshape(start.shape), decisions, fixed)
        return loss + strength / 2 * float(flat @ flat), gradient.ravel() + strength * flat

    found = minimize(
        penalised,
        start.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "ftol": tolerance},
    )
    rows: Floats = found.x.reshape(start.shape)
    return rows


def _loss(rows: Floats, decisions: Decisions, fixed: Floats) -> tuple[float, Floats]:
    """Returns the mean cross-entropy among the tokens, and its gradient `[k, width]`."""
    states, labels, weights = decisions
    own = states @ rows.T
    logits = np.concatenate([own, np.zeros((len(own), 1)), fixed], axis=1)
    logits -= logits.max(axis=1, keepdims=True)
    chances = np.exp(logits)
    chances /= chances.sum(axis=1, keepdims=True)
    places = np.arange(len(labels))
    share = weights / weights.sum()
    loss = -float(share @ np.log(np.maximum(chances[places, labels], 1e-300)))
    chances[places, labels] -= 1
    gradient: Floats = (chances[:, : len(rows)] * share[:, None]).T @ states
    return loss, gradient
