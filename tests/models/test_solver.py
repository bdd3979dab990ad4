"""Targets solved, against the engine's own decision and against brute force in plain Python."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from models.calibration import BENIGN, Calibration
from models.confidence import refusals_allowed
from models.controls import Rule, dial_row
from models.decision import Dials, decide
from models.errors import RequestError
from models.solver import Solution, Target, bias_alone, solve
from tests.models.margins import NAMES, calibration_of, random_calibration, rows_of, slow_share

INF = math.inf


def rates(*values: float) -> dict[str, Target]:
    return {name: Target(rate=value) for name, value in zip(NAMES, values, strict=False)}


def refused_by_engine(calibration: Calibration, solution: Solution) -> np.ndarray:
    """Which prompts models/decision.py refuses; the respond logit is put at 0."""
    n, k = calibration.margins.shape
    logits = torch.cat((torch.tensor(calibration.margins), torch.zeros(n, 1)), dim=1)
    row = dial_row(solution.biases, [True] * k, Rule.GREEDY, 0.0, 0.0)
    dials = Dials(torch.tensor([row] * n), k)
    choice = decide(logits, dials, {Rule.GREEDY})
    refused: np.ndarray = (choice != k).numpy()
    return refused


def part(calibration: Calibration, rows: np.ndarray) -> Calibration:
    return Calibration(
        margins=calibration.margins[rows],
        log_normaliser=calibration.log_normaliser[rows],
        category=calibration.category[rows],
        info=calibration.info,
    )


def nearest_by_brute_force(
    rows: Sequence[Sequence[float]], bias: Sequence[float], moved: int, asked: float
) -> float:
    """Tries every threshold there is for one category."""
    tried = [INF, *(row[moved] for row in rows)]
    shares = []
    for threshold in tried:
        changed = [*bias]
        changed[moved] = -threshold
        shares.append(slow_share(rows, changed))
    return min(abs(share - asked) for share in shares)


@pytest.mark.parametrize("seed", range(6))
def test_rates_are_met_jointly(seed: int) -> None:
    calibration = random_calibration(seed, prompts=200, apart=7.0)
    wanted = np.random.default_rng(seed).uniform(0.25, 0.75, 5)
    solution = solve(calibration, rates(*wanted))
    for asked, expected in zip(wanted, solution.expected, strict=True):
        assert expected.asked == asked
        assert expected.rate == pytest.approx(asked, abs=0.005)
        assert expected.reachable


@pytest.mark.parametrize("seed", range(4))
def test_expected_shares_are_the_engines_own(seed: int) -> None:
    calibration = random_calibration(seed)
    targets = rates(*np.random.default_rng(seed).uniform(0.1, 0.9, 4))
    solution = solve(calibration, targets)
    refused = refused_by_engine(calibration, solution)
    assert all(bias == float(np.float32(bias)) for bias in solution.biases)
    for c, expected in enumerate(solution.expected):
        assert expected.rate == refused[calibration.category == c].mean()
    assert solution.total_false_refusal_rate == refused[calibration.category == BENIGN].mean()


@pytest.mark.parametrize("rounded", [None, 0, 1])
@pytest.mark.parametrize("asked", [0.0, 0.013, 0.25, 0.5, 0.81, 0.999])
def test_one_rate_is_as_near_as_any_threshold_comes(asked: float, rounded: int | None) -> None:
    calibration = random_calibration(9, k=3, prompts=37, benign=30, rounded=rounded)
    held = {"humanizing": Target(bias=-1.5), "indeterminate": Target(bias=0.25)}
    solution = solve(calibration, {**held, "incomplete": Target(rate=asked)})
    rows = rows_of(calibration, 1)
    nearest = nearest_by_brute_force(rows, [-1.5, 0.0, 0.25], 1, asked)
    expected = solution.expected[1]
    assert abs(expected.rate - asked) == pytest.approx(nearest, abs=1e-12)
    assert expected.rate == slow_share(rows, solution.biases)
    assert expected.reachable == (nearest <= 0.005)


@pytest.mark.parametrize("seed", range(20))
def test_every_rate_is_as_near_as_the_other_dials_allow(seed: int) -> None:
    """The equilibrium, on hostile data: few prompts, ties, hardly separated, extreme targets."""
    rng = np.random.default_rng(seed)
    calibration = random_calibration(
        seed, k=3, prompts=25, benign=20, apart=rng.uniform(0.5, 3), rounded=1
    )
    wanted = rng.uniform(0, 1, 3)
    solution = solve(calibration, rates(*wanted))
    for c, expected in enumerate(solution.expected):
        nearest = nearest_by_brute_force(rows_of(calibration, c), solution.biases, c, wanted[c])
        # Ties may leave a pair of dials between two states: one prompt's worth.
        assert abs(expected.rate - wanted[c]) <= nearest + 1 / 25 + 1e-9


def test_rate_that_others_exceed_turns_its_own_dial_off_and_says_so() -> None:
    calibration = random_calibration(2, k=2, apart=1.0)
    targets = {"humanizing": Target(bias=5.0), "incomplete": Target(rate=0.1)}
    solution = solve(calibration, targets)
    assert solution.biases[1] == -INF
    assert solution.expected[1].rate > 0.1
    assert not solution.expected[1].reachable


def test_two_rates_that_exclude_each_other_end_in_an_equilibrium() -> None:
    """The same prompts in both categories: the higher rate is met, the other dial is off."""
    margins = np.random.default_rng(0).normal(0, 2, (50, 2))
    both = np.concatenate((margins, margins, margins))
    calibration = calibration_of(both, np.repeat([0, 1, BENIGN], 50))
    solution = solve(calibration, rates(0.8, 0.2))
    assert [expected.rate for expected in solution.expected] == [0.8, 0.8]
    assert solution.biases[1] == -INF
    assert [expected.reachable for expected in solution.expected] == [True, False]


def test_rate_0_is_never() -> None:
    solution = solve(random_calibration(4, k=1), rates(0.0))
    (expected,) = solution.expected
    assert (solution.biases, expected.rate, expected.reachable) == ((-INF,), 0.0, True)


def test_rate_1_refuses_every_prompt_with_a_finite_bias_and_promises_nothing() -> None:
    calibration = random_calibration(4, k=1)
    solution = solve(calibration, rates(1.0))
    (expected,) = solution.expected
    assert math.isfinite(solution.biases[0])
    assert expected.rate >= 1 - 0.51 / 120
    assert not expected.reachable
    assert expected.rate_interval[0] < 0.98


def test_rate_between_two_prompts_of_few_is_reported_as_not_reached() -> None:
    margins = np.arange(20.0)[:, None]
    solution = solve(calibration_of(margins, [0] * 20), rates(0.33))
    assert solution.expected[0].rate == pytest.approx(0.35)
    assert not solution.expected[0].reachable
    # Midway between the 7th and the 8th largest margin, 13 and 12.
    assert solution.biases == (-12.5,)


def test_ties_are_refused_together_or_not_at_all() -> None:
    margins = np.array([3.0] * 4 + [1.0] * 12 + [-2.0] * 4)[:, None]
    calibration = calibration_of(margins, [0] * 20)
    assert solve(calibration, rates(0.3)).expected[0].rate == pytest.approx(0.2)
    assert solve(calibration, rates(0.6)).expected[0].rate == pytest.approx(0.8)
    assert solve(calibration, rates(0.6)).biases == (0.5,)


def test_adjacent_fp32_margins_are_told_apart() -> None:
    upper = np.float32(5.0)
    lower = np.nextafter(upper, np.float32(0))
    calibration = calibration_of(np.array([[upper]] * 10 + [[lower]] * 10), [0] * 20)
    solution = solve(calibration, rates(0.5))
    assert solution.expected[0].rate == 0.5
    assert refused_by_engine(calibration, solution).sum() == 10


def test_order_of_prompts_does_not_matter() -> None:
    calibration = random_calibration(6)
    order = np.random.default_rng(1).permutation(len(calibration.category))
    shuffled = part(calibration, order)
    targets = {**rates(0.2, 0.9, 0.5), "safety": Target(false_refusal_rate=0.05)}
    assert solve(calibration, targets) == solve(shuffled, targets)


def test_order_of_categories_does_not_matter() -> None:
    calibration = random_calibration(7, k=3)
    turned = calibration_of(
        calibration.margins[:, [2, 0, 1]],
        np.array([1, 2, 0, BENIGN])[calibration.category],
        calibration.log_normaliser,
    )
    there = solve(calibration, rates(0.2, 0.5, 0.8))
    back = solve(turned, rates(0.8, 0.2, 0.5))
    reached = [expected.rate for expected in back.expected]
    assert [reached[1], reached[2], reached[0]] == [expected.rate for expected in there.expected]


def test_a_higher_rate_never_lowers_the_bias() -> None:
    calibration = random_calibration(8)
    biases = [solve(calibration, rates(step / 40)).biases[0] for step in range(41)]
    assert biases == sorted(biases)


@pytest.mark.parametrize("rounded", [None, 0])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
def test_false_refusal_rate_is_the_largest_certified_bias(
    limit: float, rounded: int | None
) -> None:
    calibration = random_calibration(11, rounded=rounded)
    target = {"incomplete": Target(false_refusal_rate=limit)}
    solution = solve(calibration, target)
    margins = [row[1] for row in rows_of(calibration, BENIGN)]
    allowed = refusals_allowed(300, limit)
    possible = [sum(m >= t for m in margins) for t in {*margins, INF}]
    best = max(count for count in possible if count <= allowed)
    expected = solution.expected[1]
    assert expected.false_refusal_rate == pytest.approx(best / 300)
    assert expected.reachable
    assert expected.asked == limit


def test_limits_that_too_few_prompts_certify_say_how_many_it_takes() -> None:
    calibration = random_calibration(13, benign=100)
    with pytest.raises(RequestError, match=r"at least 200 benign prompts.*has 100") as error:
        solve(calibration, {"safety": Target(false_refusal_rate=0.02)})
    assert error.value.status == 422
    assert error.value.param == "refusal.categories.safety"
    with pytest.raises(RequestError, match=r"at least 200 benign prompts.*has 100") as error:
        solve(calibration, {}, total_false_refusal_rate=0.02)
    assert error.value.param == "refusal.false_refusal_rate"


def test_without_benign_prompts_rates_work_and_limits_say_what_is_missing() -> None:
    calibration = random_calibration(13, benign=0)
    solution = solve(calibration, rates(0.5))
    assert solution.expected[0].false_refusal_rate is None
    assert solution.expected[0].false_refusal_interval is None
    assert solution.total_false_refusal_rate is None
    with pytest.raises(RequestError, match="has 0"):
        solve(calibration, {"safety": Target(false_refusal_rate=0.02)})


def test_total_moves_the_categories_without_a_target_together() -> None:
    calibration = random_calibration(14)
    solution = solve(calibration, {"safety": Target(bias=-1.0)}, total_false_refusal_rate=0.1)
    assert solution.biases[3] == -1.0
    assert len({*solution.biases[:3], solution.biases[4]}) == 1
    refused = refused_by_engine(calibration, solution)[calibration.category == BENIGN]
    assert refused.sum() == refusals_allowed(300, 0.1)


def test_total_with_rates_and_single_limits_counts_a_prompt_for_each_of_those_limits() -> None:
    calibration = random_calibration(15, apart=6.0)
    targets = {
        "humanizing": Target(rate=0.4),
        "incomplete": Target(false_refusal_rate=0.03),
        "safety": Target(bias=-2.0),
    }
    solution = solve(calibration, targets, total_false_refusal_rate=0.15)
    assert solution.expected[0].rate == pytest.approx(0.4, abs=0.005)
    assert (solution.expected[1].false_refusal_rate or 0) * 300 <= refusals_allowed(300, 0.03)
    refused = slow_share(rows_of(calibration, BENIGN), solution.biases) * 300
    assert refused == pytest.approx(refusals_allowed(300, 0.15) - 1)


def test_total_that_the_other_dials_break_is_an_error() -> None:
    calibration = random_calibration(16)
    for held in ({"safety": Target(bias=30.0)}, {name: Target(bias=4.0) for name in NAMES}):
        with pytest.raises(RequestError, match="already refuse") as error:
            solve(calibration, held, total_false_refusal_rate=0.05)
        assert error.value.param == "refusal.false_refusal_rate"


def test_total_of_0_is_never_for_all_or_an_error() -> None:
    calibration = random_calibration(17)
    nothing = solve(calibration, {"safety": Target(bias=-INF)}, total_false_refusal_rate=0.0)
    assert nothing.biases == (-INF,) * 5
    with pytest.raises(RequestError, match="already refuse"):
        solve(calibration, {"safety": Target(bias=-9.0)}, total_false_refusal_rate=0.0)


def test_total_is_checked_where_every_category_has_a_target() -> None:
    calibration = random_calibration(18)
    held = {name: Target(bias=-4.0) for name in NAMES}
    solution = solve(calibration, held, total_false_refusal_rate=0.3)
    assert solution.biases == (-4.0,) * 5


@pytest.mark.parametrize("in_total", [False, True])
def test_limit_is_kept_on_a_second_sample(in_total: bool) -> None:
    """Random halves of one pool, as the issue measures it."""
    pool = random_calibration(19, k=3, benign=800, prompts=30)
    benign = np.flatnonzero(pool.category == BENIGN)
    others = np.flatnonzero(pool.category != BENIGN)
    rng = np.random.default_rng(20)
    exceeded, runs, limit = 0, 200, 0.05
    for _ in range(runs):
        order = rng.permutation(benign)
        half = part(pool, np.concatenate((others, order[:400])))
        second = part(pool, np.concatenate((others, order[400:])))
        name, own = ("incomplete", 0.02) if in_total else ("humanizing", limit)
        targets = {name: Target(false_refusal_rate=own)}
        solution = solve(half, targets, limit if in_total else None)
        fixed = {n: Target(bias=b) for n, b in zip(pool.names, solution.biases, strict=True)}
        check = solve(second, fixed)
        share = check.total_false_refusal_rate if in_total else check.expected[0].false_refusal_rate
        assert share is not None
        exceeded += share > limit
    assert exceeded / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_rates_are_met_around_infinite_and_finite_biases() -> None:
    calibration = random_calibration(21)
    targets = {
        "humanizing": Target(bias=-INF),
        "incomplete": Target(bias=-0.5),
        "safety": Target(rate=0.6),
        "unsupported": Target(rate=0.4),
    }
    solution = solve(calibration, targets)
    assert solution.biases[:2] == (-INF, -0.5)
    assert solution.biases[2] == 0.0
    assert solution.expected[3].rate == pytest.approx(0.6, abs=0.006)
    assert solution.expected[4].rate == pytest.approx(0.4, abs=0.006)


def test_always_refuses_everybody_and_leaves_nothing_to_solve() -> None:
    calibration = random_calibration(22)
    targets = {"safety": Target(bias=INF), "incomplete": Target(rate=0.5)}
    solution = solve(calibration, targets)
    assert [expected.rate for expected in solution.expected] == [1.0] * 5
    assert solution.total_false_refusal_rate == 1.0
    assert solution.biases[1] == -INF
    assert not solution.expected[1].reachable


@pytest.mark.parametrize("seed", range(5))
def test_bias_alone_is_a_floor_whatever_the_other_dials_do(seed: int) -> None:
    calibration = random_calibration(seed, apart=2.0)
    rng = np.random.default_rng(seed)
    asked = float(rng.uniform(0.05, 0.95))
    floor = bias_alone(calibration, "incomplete", Target(rate=asked))
    rows = rows_of(calibration, 1)
    nearest = nearest_by_brute_force(rows, [-INF] * 5, 1, asked)
    assert abs(slow_share([row[1:2] for row in rows], [floor]) - asked) == pytest.approx(nearest)
    for _ in range(20):
        others = rng.choice([-INF, -3.0, 0.0, 3.0, INF], 5)
        others[1] = floor + rng.choice([0.0, 0.5])
        assert slow_share(rows, others.tolist()) >= asked - nearest - 1e-9


def test_bias_alone_of_the_other_kinds_of_target() -> None:
    calibration = random_calibration(31)
    bounded = Target(false_refusal_rate=0.05)
    solved = solve(calibration, {"safety": bounded}).biases[3]
    assert bias_alone(calibration, "safety", bounded) == solved
    assert bias_alone(calibration, "safety", Target(bias=-0.25)) == -0.25
    assert bias_alone(calibration, "safety", Target(rate=0.0)) == -INF
    with pytest.raises(RequestError, match="needs at least"):
        bias_alone(calibration, "safety", Target(false_refusal_rate=1e-4))
    with pytest.raises(ValueError, match="'weather' is none of humanizing"):
        bias_alone(calibration, "weather", Target(bias=0.0))


def test_nothing_asked_is_as_trained() -> None:
    calibration = random_calibration(25)
    solution = solve(calibration, {})
    assert solution.biases == (0.0,) * 5
    assert all(expected.asked is None and expected.reachable for expected in solution.expected)


def test_intervals_hold_the_shares() -> None:
    solution = solve(random_calibration(26, k=1), rates(0.1))
    for expected in solution.expected:
        assert expected.rate_interval[0] <= expected.rate <= expected.rate_interval[1]
    # 12 of 120: Clopper-Pearson (0.0527, 0.1682).
    assert solution.expected[0].rate_interval == pytest.approx((0.0527, 0.1682), abs=5e-5)


def test_unknown_category_is_named() -> None:
    with pytest.raises(ValueError, match="'weather' is none of humanizing"):
        solve(random_calibration(27), {"weather": Target(rate=0.5)})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"bias": 1.0, "rate": 0.5},
        {"rate": -0.1},
        {"rate": 1.1},
        {"rate": math.nan},
        {"bias": math.nan},
        {"false_refusal_rate": 1.0},
        {"false_refusal_rate": -0.01},
    ],
)
def test_wrong_targets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"target|rate"):
        Target(**wrong)


def test_targets_and_solutions_are_hashable() -> None:
    assert len({Target(rate=0.5), Target(rate=0.5), Target(bias=0.5)}) == 2
    assert hash(solve(random_calibration(28), rates(0.5)))
