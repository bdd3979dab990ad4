import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from models.errors import ConfigError
from training.model.token_rows import FOLDS, STRENGTHS, Decisions, Floats, fit, fit_one

ROWS, WIDTH = 240, 6


def _decisions(categories: int, seed: int = 0) -> Decisions:
    """Returns decisions that rows drawn at random explain for the most part."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(ROWS, WIDTH)) * np.array([1, 10, 0.1, 1, 1, 0]) + [
        0,
        30,
        0,
        0,
        0,
        2,
    ]
    rows = random.normal(size=(categories, WIDTH)) / np.array([1, 10, 0.1, 1, 1, 1])
    logits = np.c_[(states - states.mean(0)) @ rows.T * 3, np.zeros(ROWS)]
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return Decisions(states, labels, random.uniform(0.5, 2, size=ROWS))


def _loss(margins: Floats, decisions: Decisions) -> float:
    logits = np.c_[margins, np.zeros(len(margins))]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = chances[np.arange(len(margins)), decisions.labels]
    return float(-(decisions.weights @ np.log(right)) / decisions.weights.sum())


def test_one_category_is_scikit_learns_logistic_regression() -> None:
    decisions = _decisions(1)
    found = fit(decisions, 1)
    scale = decisions.states.std(0)
    scale[-1] = np.inf
    reference = LogisticRegression(
        fit_intercept=False,
        C=1 / (found.strength * decisions.weights.sum()),
        tol=1e-10,
        max_iter=10_000,
    )
    reference.fit(decisions.states / scale, decisions.labels == 0, decisions.weights)
    assert np.allclose(found.rows[0], reference.coef_[0] / scale, atol=1e-3)


def test_strength_is_the_one_that_cross_validation_prefers() -> None:
    found = fit(_decisions(3), 3)
    assert found.losses[found.strength] == min(found.losses.values())
    assert list(found.losses) == list(STRENGTHS[: len(found.losses)])
    assert STRENGTHS[0] > found.strength > STRENGTHS[-1]


def test_rows_decide_better_than_the_shares_of_the_labels() -> None:
    decisions = _decisions(3)
    rows = fit(decisions, 3).rows
    shares = [decisions.weights[decisions.labels == label].sum() for label in range(4)]
    chances = np.array(shares) / sum(shares)
    constant = np.tile(np.log(chances[:3] / chances[3]), (ROWS, 1))
    assert _loss(decisions.states @ rows.T, decisions) < 0.7 * _loss(constant, decisions)


def test_same_decisions_give_the_same_rows() -> None:
    assert (fit(_decisions(2), 2).rows == fit(_decisions(2), 2).rows).all()


def test_one_more_row_is_learnt_beside_margins_that_stay() -> None:
    decisions = _decisions(3)
    everything = fit(decisions, 3)
    margins = decisions.states @ everything.rows[1:].T
    labels = np.where(decisions.labels == 0, 0, 1)
    alone = fit_one(decisions._replace(labels=labels), margins)
    together = np.c_[decisions.states @ alone.rows.T, margins]
    reference = decisions.states @ everything.rows.T
    assert alone.rows.shape == (1, WIDTH)
    assert _loss(together, decisions) < _loss(reference, decisions) + 0.02


def test_category_needs_a_row_for_each_fold() -> None:
    decisions = _decisions(2)
    labels = np.array([0] * (FOLDS - 1) + [1] * 20 + [2] * (ROWS - FOLDS - 19))
    with pytest.raises(ConfigError, match=rf"needs {FOLDS} rows of every category .* there are 4"):
        fit(decisions._replace(labels=labels), 2)
