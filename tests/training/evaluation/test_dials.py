import math
from dataclasses import replace

import numpy as np
import pytest

from models.controls import Controls, Rule
from models.decision import refused_category
from training.client import SolvedRate
from training.evaluation.decisions import Observed, controls, decisions, set_report
from training.evaluation.dials import (
    RATES,
    cross_talk,
    decided_by_rule,
    rates,
    rules,
    sweeps,
    tokens,
)
from training.evaluation.robustness import robustness
from training.evaluation.statistics import counted, missing

NAMES = ("a", "b")
RNG = np.random.default_rng(0)


def observed(
    margins: list[list[float]], truth: list[int], near: list[int] | None = None
) -> Observed:
    """Returns prompts decided as the model decides them; 2 is "should be answered"."""
    found = Observed(
        names=NAMES,
        sets=np.array(["s"] * len(truth)),
        truth=np.array(truth),
        near_miss=np.array([at in (near or []) for at in range(len(truth))]),
        margins=np.array(margins, dtype=np.float32),
        log_normaliser=np.log1p(np.exp(margins).sum(axis=1)).astype(np.float32) + 0.5,
        decided=np.array(truth),
    )
    return replace(found, decided=decisions(found, controls((0.0, 0.0))))


# Two of "a" (one missed), one of "b" refused as "a", three to answer (one refused).
SIX = observed(
    [[2.0, -1.0], [-1.0, -3.0], [3.0, 2.0], [-4.0, -4.0], [-2.0, -5.0], [-6.0, 1.0]],
    [0, 0, 1, 2, 2, 2],
    near=[5],
)
MANY = observed(RNG.normal(0, 3, (300, 2)).tolist(), RNG.integers(0, 3, 300).tolist())


def test_set_report_counts_by_hand() -> None:
    report = set_report(SIX, seed=0)

    assert (report.safe.refused.hits, report.safe.refused.n) == (1, 3)
    assert (report.unsafe.refused.hits, report.unsafe.refused.n) == (2, 3)
    assert (report.near_misses.refused.hits, report.near_misses.prompts) == (1, 1)
    assert (report.right_category.hits, report.right_category.n) == (1, 2)
    assert report.categories["a"].refused.value == 0.5
    assert report.categories["b"].right_category.value == 0.0
    assert report.categories["a"].margins["0.5"] == 0.5
    assert report.confusion.counts == [[1, 0, 1], [1, 0, 0], [0, 1, 2]]
    # Precision 2/3, recall 2/3.
    assert report.f1.value == pytest.approx(2 / 3)


def test_set_without_safe_prompts_has_reasons_and_no_zeros() -> None:
    report = set_report(SIX.of(SIX.unsafe), seed=0)

    for figure in (
        report.safe.refused,
        report.auc,
        report.refused_at_5,
        report.near_misses.refused,
    ):
        assert figure.value is None
        assert figure.reason
    assert report.f1.value is not None
    assert set_report(SIX.of(~SIX.unsafe), seed=0).f1.value is None


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("bias", [(0.0, 0.0), (1.5, -2.0), (math.inf, 0.0), (-math.inf, -math.inf)])
def test_all_prompts_are_decided_as_each_alone(rule: Rule, bias: tuple[float, float]) -> None:
    chosen = Controls(rule, bias, (True, True))
    drawn = RNG.random(len(MANY)).tolist() if rule is Rule.SAMPLE else None

    found = decisions(MANY, chosen, 0.0, drawn)

    one = [
        refused_category(float(norm), margins.tolist(), chosen, 0.0, seed=1)
        for margins, norm in zip(MANY.margins, MANY.log_normaliser, strict=True)
    ]
    assert found.tolist() == [2 if column is None else column for column in one]


def test_sampled_decisions_are_those_of_the_request_s_seed() -> None:
    seeds = list(range(len(MANY)))

    found = decided_by_rule(MANY, seeds)["sample"]

    zeros = Controls(Rule.SAMPLE, (0.0, 0.0), (True, True))
    one = [
        refused_category(float(norm), margins.tolist(), zeros, 1.0, seed)
        for margins, norm, seed in zip(MANY.margins, MANY.log_normaliser, seeds, strict=True)
    ]
    assert found.tolist() == [2 if column is None else column for column in one]


def test_sweeps_go_from_nothing_to_everything_and_never_back() -> None:
    found = sweeps(MANY, (0.0, 0.0))

    for points in (found.shared, found.paper):
        shares = [point.unsafe.value or 0.0 for point in points]
        assert shares == sorted(shares)
        assert shares[0] < 0.05
        assert shares[-1] > 0.95
    for name, points in found.dials.items():
        shares = [point.categories[name].value or 0.0 for point in points]
        assert shares == sorted(shares)
    assert 0.0 in [point.bias for point in found.shared]


def test_sweep_at_zero_is_the_model_s_own_decision() -> None:
    (point,) = [point for point in sweeps(SIX, (0.0, 0.0)).shared if point.bias == 0]

    assert (point.safe.hits, point.unsafe.hits, point.sensitivity) == (1, 2, 0.5)


def test_rates_compare_what_the_server_solved() -> None:
    # Bias 1 refuses both of "a", whatever was asked for.
    solved = {"a": [SolvedRate((1.0, 0.0), reachable=rate > 0.5) for rate in RATES]}

    found = rates(SIX, solved, seed=0)

    assert {point.achieved.value for point in found.points["a"]} == {1.0}
    assert found.largest_gap.value == pytest.approx(0.4)  # of 0.6, the least reachable one
    assert found.largest_gap.n == 4


def test_rates_without_prompts_or_calibration_have_reasons() -> None:
    none_of_a = SIX.of(SIX.truth != 0)
    solved = {"a": [SolvedRate((math.inf, 0.0), reachable=True)] * len(RATES)}

    found = rates(none_of_a, solved, seed=0)

    assert found.points["a"][0].bias == "always"
    assert "category a" in str(found.points["a"][0].achieved.reason)
    assert found.largest_gap.value is None
    assert rates(SIX, "no calibration", seed=0).reason == "no calibration"


def test_cross_talk_counts_what_another_dial_changes() -> None:
    # Where "a" is refused at 10 %, only 5 is; at 90 %, all down to 1 are. "b" has one at 3.
    own = [[float(margin), -9.0] for margin in (5, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 4.3, 1.0, 0.5)]
    prompts = observed([*own, [3.0, -1.0], [-8.0, -1.0]], [0] * 10 + [1, 1])

    talk = cross_talk(prompts, (0.0, 0.0))["a"]["b"]

    assert [rate.hits for rate in talk.rates] == [0] * 8 + [1]
    assert (talk.changed.hits, talk.changed.n) == (1, 2)


def test_cross_talk_without_prompts_says_of_which_category() -> None:
    found = cross_talk(SIX.of(SIX.truth != 1), (0.0, 0.0))

    assert "category b" in str(found["a"]["b"].changed.reason)
    assert "category b" in str(found["b"]["a"].changed.reason)


def test_single_token_has_the_probability_of_all() -> None:
    # Neither token alone reaches the respond token, both together do.
    found = tokens(observed([[-0.5, -0.5], [-3.0, -3.0]], [0, 2]), seed=0)

    assert (found.single.unsafe.hits, found.categories.unsafe.hits) == (1, 0)
    assert found.differ.value == 0.5


def test_one_category_has_nothing_to_compare() -> None:
    single = replace(SIX, names=("a",), margins=SIX.margins[:, :1], truth=SIX.truth // 2)

    assert "one category" in str(tokens(single, seed=0).differ.reason)


def test_rules_are_compared_with_greedy() -> None:
    decided = decided_by_rule(MANY, list(range(len(MANY))))

    found = rules(MANY, decided, dict.fromkeys(decided, counted(1, 1, "")))

    assert found["greedy"].differ.hits == 0
    assert found["sample"].differ.hits == int(
        ((decided["sample"] < 2) != (decided["greedy"] < 2)).sum()
    )
    # It asks for half of the whole vocabulary's probability.
    assert (found["paper"].unsafe.hits or 0) <= (found["greedy"].unsafe.hits or 0)


def test_robustness_counts_flips_in_both_directions() -> None:
    # Decided: a, -, a, -, -, b.
    found = robustness(SIX, {"v": np.array([2, 0, 1, 2, 2, 1]), "w": "why"})

    assert (found["v"].changed.hits, found["v"].changed.n) == (2, 6)
    assert (found["v"].to_refused.hits, found["v"].to_refused.n) == (1, 3)
    assert (found["v"].to_answered.hits, found["v"].to_answered.n) == (1, 3)
    assert (found["v"].other_category.hits, found["v"].other_category.n) == (1, 2)
    assert found["w"].sets["s"] == missing("why")
