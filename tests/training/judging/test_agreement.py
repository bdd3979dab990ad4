import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from training.judging.agreement import cohens_kappa, pairs, table
from training.judging.exchanges import Outcome

R: Outcome = "refused"
A: Outcome = "answered"
U: Outcome = "undecided"


def test_pair_counts_what_both_decided() -> None:
    # Of four texts that both decided three agree. By chance: 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    (pair,) = pairs({"token": [R, R, A, A, R, U], "judge": [R, A, A, A, U, A]})

    assert (pair.first, pair.second, pair.agreed, pair.both) == ("token", "judge", 3, 4)
    assert pair.kappa == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    assert pair.kappa is not None
    assert pair.kappa_interval is not None
    assert pair.kappa_interval[0] <= pair.kappa <= pair.kappa_interval[1]


def test_every_two_readers_are_compared() -> None:
    read: dict[str, list[Outcome]] = {"a": [R, A], "b": [R, A], "c": [A, R]}
    found = {(pair.first, pair.second): pair.kappa for pair in pairs(read)}
    assert found == {("a", "b"): 1.0, ("a", "c"): -1.0, ("b", "c"): -1.0}


@pytest.mark.parametrize("outcomes", [[], [U, U], [R, R], [A]])
def test_kappa_is_unknown_where_there_is_one_outcome_or_none(outcomes: list[Outcome]) -> None:
    (pair,) = pairs({"a": outcomes, "b": outcomes})
    assert pair.kappa is None
    assert pair.kappa_interval is None


def test_kappa_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first: list[Outcome] = [(A, R)[n] for n in rng.integers(0, 2, 30)]
        second = [one if rng.random() < 0.7 else (A, R)[rng.integers(0, 2)] for one in first]
        expected = cohen_kappa_score(first, second)
        assert float(cohens_kappa(table(first, second))) == pytest.approx(expected)


def test_interval_is_that_of_resampled_texts() -> None:
    first: list[Outcome] = [R] * 40 + [A] * 40
    second: list[Outcome] = [R] * 30 + [A] * 45 + [R] * 5
    (pair,) = pairs({"a": first, "b": second})
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(500):
        drawn = rng.integers(0, 80, 80)
        resampled.append(cohen_kappa_score([first[d] for d in drawn], [second[d] for d in drawn]))
    low, high = np.quantile(resampled, (0.025, 0.975))
    assert pair.kappa_interval == pytest.approx((low, high), abs=0.05)
    assert not math.isnan(low)
