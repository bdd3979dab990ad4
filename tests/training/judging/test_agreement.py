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
    pair = pairs({"token": [R, R, A, A, R, U], "judge": [R, A, A, A, U, A]})["token-judge"]

    assert (pair.agreement.hits, pair.agreement.n) == (3, 4)
    assert pair.kappa.value == pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2))
    assert pair.kappa.n == 4
    assert pair.kappa.low is not None
    assert pair.kappa.high is not None
    assert pair.kappa.low <= (pair.kappa.value or 0.0) <= pair.kappa.high


def test_every_two_readers_are_compared() -> None:
    read: dict[str, list[Outcome]] = {"a": [R, A], "b": [R, A], "c": [A, R]}
    found = {name: pair.kappa.value for name, pair in pairs(read).items()}
    assert found == {"a-b": 1.0, "a-c": -1.0, "b-c": -1.0}


@pytest.mark.parametrize("outcomes", [[], [U, U], [R, R], [A]])
def test_kappa_has_a_reason_where_there_is_one_outcome_or_none(outcomes: list[Outcome]) -> None:
    kappa = pairs({"a": outcomes, "b": outcomes})["a-b"].kappa
    assert kappa.value is None
    assert kappa.reason


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
    kappa = pairs({"a": first, "b": second})["a-b"].kappa
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(300):
        drawn = rng.integers(0, 80, 80)
        resampled.append(cohen_kappa_score([first[d] for d in drawn], [second[d] for d in drawn]))
    ends = tuple(np.quantile(resampled, (0.025, 0.975)))
    assert (kappa.low, kappa.high) == pytest.approx(ends, abs=0.05)
