import math

import pytest

from training.run.halving import Plan, halving, successive_halving

PLAN: Plan[str] = Plan((1.0, 3.0, 9.0), (3, 2))
# Score of each candidate at each budget.
SCORES = {
    "a": {1.0: 0.5, 3.0: 0.6, 9.0: 0.7},
    "b": {1.0: 0.9, 3.0: 0.2},
    "c": {1.0: 0.8, 3.0: 0.8, 9.0: 0.6},
    "d": {1.0: 0.4},
    "e": {1.0: 0.1},
}


def table(candidate: str, budget: float) -> float:
    return SCORES[candidate][budget]


def test_the_worse_drop_out_rung_by_rung() -> None:
    choice = successive_halving(list("abcde"), table, PLAN)
    assert choice.best == "a"
    assert [[t.candidate for t in rung] for rung in choice.rungs] == [
        list("abcde"),
        list("abc"),
        list("ac"),
    ]
    assert [[t.candidate for t in rung if t.kept] for rung in choice.rungs] == [
        list("abc"),
        list("ac"),
        ["a"],
    ]
    assert choice.cost == 5 * 1 + 3 * 3 + 2 * 9
    assert choice.reason == "it has the best score of the last rung, 0.7"


def test_no_candidate_is_tried_with_more_than_it_earned() -> None:
    # `table` has no score of "d" beyond the first budget: a KeyError would end this.
    seen: list[tuple[str, float]] = []

    def score(candidate: str, budget: float) -> float:
        seen.append((candidate, budget))
        return table(candidate, budget)

    successive_halving(list("abcde"), score, PLAN)
    assert len(seen) == len(set(seen)) == 10


def test_the_standard_stays_to_the_end() -> None:
    scores = {**SCORES, "e": {1.0: 0.1, 3.0: 0.1, 9.0: 0.1}}
    plan = PLAN._replace(standards=("e".__eq__,))
    choice = successive_halving(list("abcde"), lambda c, b: scores[c][b], plan)
    assert [len(rung) for rung in choice.rungs] == [5, 4, 3]
    assert choice.best == "a"
    assert (
        choice.reason == "its score of 0.7 is 0.6 above the standard's, more than the 0 asked for"
    )


def test_the_best_of_several_standards_stays() -> None:
    scores = {**SCORES, "d": {1.0: 0.4, 3.0: 0.0, 9.0: 0.0}}
    plan = PLAN._replace(standards=(lambda candidate: candidate in "de",))
    choice = successive_halving(list("abcde"), lambda c, b: scores[c][b], plan)
    assert [t.candidate for t in choice.rungs[-1]] == ["a", "c", "d"]


def test_the_best_of_each_kind_stays_and_the_best_score_says_which_one_stands() -> None:
    scores = {**SCORES, "d": {1.0: 0.3, 3.0: 0.1, 9.0: 0.2}}
    for stands, best in ((0, "c"), (1, "d")):
        asked: list[float] = []

        def standing(score: float, stands: int = stands, asked: list[float] = asked) -> int:
            asked.append(score)
            return stands

        plan = PLAN._replace(
            standards=("c".__eq__, "d".__eq__), standing=standing, least_gain=lambda score: 9.0
        )
        choice = successive_halving(list("abcd"), lambda c, b: scores[c][b], plan)
        assert {"c", "d"} <= {t.candidate for t in choice.rungs[-1]}
        assert choice.best == best
        assert asked == [0.7]


@pytest.mark.parametrize(("least", "best"), [(0.09, "a"), (0.11, "c"), (math.inf, "c")])
def test_a_small_gain_leaves_the_standard(least: float, best: str) -> None:
    asked: list[float] = []

    def least_gain(standard: float) -> float:
        asked.append(standard)
        return least

    plan = PLAN._replace(standards=("c".__eq__,), least_gain=least_gain)
    choice = successive_halving(list("abcde"), table, plan)
    assert choice.best == best
    assert asked == [0.6]


def test_a_standard_that_is_best_needs_no_gain() -> None:
    plan = PLAN._replace(standards=("a".__eq__,))
    choice = successive_halving(list("abcde"), table, plan)
    assert choice.best == "a"
    assert "the standard's score is 0.7" in choice.reason


def test_equal_scores_are_decided_by_the_order() -> None:
    for order in ("abc", "cab"):
        choice = successive_halving(list(order), lambda c, b: 1.0, Plan((1.0, 2.0), (2,)))
        assert choice.best == order[0]


def test_what_is_no_number_is_the_worst() -> None:
    scores = {"a": math.nan, "b": -5.0, "c": math.inf}
    choice = successive_halving(list("abc"), lambda c, b: scores[c], Plan((1.0,), ()))
    assert choice.best == "b"
    assert [trial.score for trial in choice.rungs[0]] == [-math.inf, -5.0, -math.inf]


def test_a_standard_that_failed_does_not_win() -> None:
    scores = {"a": math.nan, "b": 0.5}
    plan: Plan[str] = Plan((1.0,), (), ("a".__eq__,), least_gain=lambda score: 9.0)
    assert successive_halving(list("ab"), lambda c, b: scores[c], plan).best == "b"


def test_if_nothing_worked_the_standard_wins() -> None:
    plan: Plan[str] = Plan((1.0,), (), ("b".__eq__,))
    choice = successive_halving(list("ab"), lambda c, b: math.nan, plan)
    assert choice.best == "b"
    assert choice.reason == "no candidate gave a score"


def test_wrong_plans_are_named() -> None:
    with pytest.raises(ValueError, match="all different"):
        successive_halving([], table, PLAN)
    with pytest.raises(ValueError, match="all different"):
        successive_halving(list("aa"), table, PLAN)
    for budgets in ((), (0.0, 1.0), (2.0, 2.0)):
        with pytest.raises(ValueError, match="budgets must be above 0 and rise"):
            successive_halving(list("ab"), table, Plan(budgets, (1,)))
    for keep in ((), (1, 1), (0,)):
        with pytest.raises(ValueError, match="2 budgets need 1 counts of at least 1"):
            successive_halving(list("ab"), table, Plan((1.0, 2.0), keep))
    search = halving(list("ab"), Plan((1.0,), ()))
    next(search)
    with pytest.raises(ValueError, match="2 candidates need as many scores, not 1"):
        search.send([0.5])
