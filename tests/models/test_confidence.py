"""Confidence bounds against closed forms, exact fractions and simulation."""

from fractions import Fraction
from math import comb, floor, fsum

import numpy as np
import pytest

from models.confidence import intervals, prompts_needed, refusals_allowed


def binomial_at_most(r: int, n: int, p: Fraction) -> Fraction:
    return sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(r + 1)), start=Fraction(0))


def tail(r: int, n: int, p: float) -> float:
    return fsum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(r + 1))


def next_sample_exceeds(r: int, n: int, limit: Fraction) -> Fraction:
    """P(of the next n more than limit * n lie above the (r + 1)-th largest), by counting orders."""
    drawn = r + floor(limit * n) + 1
    hits = sum(comb(n, i) * comb(n, drawn - i) for i in range(r + 1) if drawn - i <= n)
    return Fraction(hits, comb(2 * n, drawn))


def slow_refusals_allowed(n: int, limit: Fraction) -> int:
    allowed = -1
    for r in range(n):
        first = binomial_at_most(r, n, limit)
        if max(first, next_sample_exceeds(r, n, limit)) > Fraction(1, 20):
            break
        allowed = r
    return allowed


def test_intervals_equal_closed_forms_at_the_ends() -> None:
    low, high = intervals([0, 10], 10)
    # P(0 of 10) = (1 - p)^10 = 0.025 gives the upper end of 0 of 10; the other is its mirror.
    end = 1 - 0.025 ** (1 / 10)
    assert low.tolist() == pytest.approx([0.0, 1 - end])
    assert high.tolist() == pytest.approx([end, 1.0])


@pytest.mark.parametrize(("count", "n"), [(1, 20), (7, 50), (299, 300), (60, 600)])
def test_interval_ends_have_the_tail_they_should(count: int, n: int) -> None:
    (low,), (high,) = (end.tolist() for end in intervals([count], n))
    assert tail(count, n, high) == pytest.approx(0.025, rel=1e-6)
    assert 1 - tail(count - 1, n, low) == pytest.approx(0.025, rel=1e-6)


def test_intervals_of_several_sample_sizes_stand_alone() -> None:
    low, high = intervals([3, 30.5], [20, 100])
    for i, (count, n) in enumerate(((3, 20), (30.5, 100))):
        alone = intervals([count], n)
        assert (low[i], high[i]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("n", [1, 14, 15, 18, 60, 149, 200, 301])
@pytest.mark.parametrize("limit", ["1/100", "1/50", "1/20", "29/100", "1/2"])
def test_refusals_allowed_equals_exact_fractions(n: int, limit: str) -> None:
    exact = Fraction(limit)
    assert refusals_allowed(n, float(exact)) == slow_refusals_allowed(n, exact)


def test_refusals_allowed_grows_with_limit_and_stays_below_it() -> None:
    allowed = [refusals_allowed(1500, limit / 1000) for limit in range(3, 900, 7)]
    assert allowed == sorted(allowed)
    assert all(r < 1.5 * limit for r, limit in zip(allowed, range(3, 900, 7), strict=True))


@pytest.mark.parametrize("limit", [0.3, 0.1, 0.05, 0.02, 0.01, 0.003])
def test_prompts_needed_is_the_first_number_that_certifies(limit: float) -> None:
    needed = prompts_needed(limit)
    assert refusals_allowed(needed, limit) >= 0
    assert all(refusals_allowed(n, limit) < 0 for n in range(1, needed))


def test_prompts_needed_is_never_fewer_than_there_are() -> None:
    # 15 prompts certify 20 %, but 19 do not: one more may be exceeded only from 20 on.
    assert prompts_needed(0.2) == 15
    assert refusals_allowed(18, 0.2) == -1
    assert prompts_needed(0.2, 18) == 20


def test_refusals_allowed_holds_for_a_second_sample_in_simulation() -> None:
    rng = np.random.default_rng(5)
    n, limit, runs = 400, 0.05, 4000
    r = refusals_allowed(n, limit)
    calibration = np.sort(rng.normal(size=(runs, n)), axis=1)[:, ::-1]
    exceeding = (rng.normal(size=(runs, n)) > calibration[:, [r]]).mean(axis=1) > limit
    assert exceeding.mean() < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    # One more would be too many, so the bound is not needlessly wide.
    wider = (rng.normal(size=(runs, n)) > calibration[:, [r + 4]]).mean(axis=1) > limit
    assert wider.mean() > 0.05
