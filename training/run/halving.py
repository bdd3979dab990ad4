"""Successive halving: many candidates tried shortly, the better ones again and longer."""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Generic, NamedTuple, TypeVar

C = TypeVar("C")


def _nothing(_: float) -> float:
    return 0.0


def _first(_: float) -> int:
    return 0


class Trial(NamedTuple, Generic[C]):
    """One candidate tried with one budget.

    Attributes:
        candidate: What was tried.
        budget: What it was given.
        score: What came out; more is better. Minus infinity where the score was not a number.
        kept: Whether it went on to the next rung; in the last rung, whether it was chosen.
    """

    candidate: C
    budget: float
    score: float
    kept: bool


class Choice(NamedTuple, Generic[C]):
    """What won, and everything that was tried.

    Attributes:
        best: The winner.
        rungs: The trials of each budget, in the order of the candidates.
        reason: Why it won, one sentence.
    """

    best: C
    rungs: tuple[tuple[Trial[C], ...], ...]
    reason: str

    @property
    def cost(self) -> float:
        """The sum of all budgets that were spent."""
        return sum(trial.budget for rung in self.rungs for trial in rung)


class Plan(NamedTuple, Generic[C]):
    """How a search goes.

    Attributes:
        budgets: Of each rung; rising, above 0.
        keep: How many candidates go on after each rung but the last.
        standards: Kinds of candidates that one would take without any search. The best of each kind
            goes on from every rung, beyond `keep` if need be.
        standing: Which of the standards wins the last rung unless another candidate gains more than
            `least_gain` on it, given the best score there; the first one by default.
        least_gain: What that gain must exceed, at least 0, given the standard's score.
    """

    budgets: tuple[float, ...]
    keep: tuple[int, ...]
    standards: tuple[Callable[[C], bool], ...] = ()
    standing: Callable[[float], int] = _first
    least_gain: Callable[[float], float] = _nothing


def successive_halving(
    candidates: Sequence[C], score: Callable[[C, float], float], plan: Plan[C]
) -> Choice[C]:
    """Tries all candidates with the first budget, the best of them with the next, and so on.

    Deterministic if `score` is: among equal scores the earlier candidate is the better one.

    Args:
        candidates: At least one, all different.
        score: Score of a candidate at a budget; more is better, what is no number is the worst.
        plan: Budgets and who stays.

    Raises:
        ValueError: No candidates, equal ones, or a plan that does not fit together.

    Source:
        Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
        Optimization, arXiv 1502.07943, figure 3.
    """
    search = halving(candidates, plan)
    left, budget = next(search)
    while True:
        try:
            left, budget = search.send([score(candidate, budget) for candidate in left])
        except StopIteration as end:
            choice: Choice[C] = end.value
            return choice


def halving(
    candidates: Sequence[C], plan: Plan[C]
) -> Generator[tuple[list[C], float], Sequence[float], Choice[C]]:
    """Is `successive_halving` for scores that are measured a whole rung at once.

    Yields:
        The candidates that are left and their budget; wants their scores sent back.

    Returns:
        The choice, as the value of `StopIteration`.

    Raises:
        ValueError: As `successive_halving`, or there is not one score for each candidate.
    """
    _check(candidates, plan)
    left = list(candidates)
    rungs: list[tuple[Trial[C], ...]] = []
    reason = ""
    for rung, budget in enumerate(plan.budgets):
        measured = yield left, budget
        scores = [score if math.isfinite(score) else -math.inf for score in measured]
        if len(scores) != len(left):
            raise ValueError(f"{len(left)} candidates need as many scores, not {len(scores)}")
        ranked = sorted(range(len(left)), key=scores.__getitem__, reverse=True)
        bests = [_best(kind, left, ranked) for kind in plan.standards]
        if rung < len(plan.keep):
            kept = {*ranked[: plan.keep[rung]], *(at for at in bests if at is not None)}
        else:
            standard = bests[plan.standing(scores[ranked[0]])] if bests else None
            winner, reason = _winner(scores, ranked, standard, plan)
            kept = {winner}
        rungs.append(tuple(Trial(c, budget, scores[at], at in kept) for at, c in enumerate(left)))
        left = [candidate for at, candidate in enumerate(left) if at in kept]
    return Choice(left[0], tuple(rungs), reason)


def _best(kind: Callable[[C], bool], left: Sequence[C], ranked: Sequence[int]) -> int | None:
    return next((at for at in ranked if kind(left[at])), None)


def _winner(
    scores: Sequence[float], ranked: Sequence[int], standard: int | None, plan: Plan[C]
) -> tuple[int, str]:
    """Returns the winner's place in the last rung, and why it is that one."""
    best = ranked[0]
    if scores[best] == -math.inf:
        return (best if standard is None else standard), "no candidate gave a score"
    if standard is None or scores[standard] == -math.inf:
        return best, f"it has the best score of the last rung, {scores[best]:.6g}"
    gain, asked = scores[best] - scores[standard], plan.least_gain(scores[standard])
    if gain > asked:
        return best, (
            f"its score of {scores[best]:.6g} is {gain:.3g} above the standard's, more than the "
            f"{asked:.3g} asked for"
        )
    return standard, (
        f"the standard's score is {scores[standard]:.6g}; the best one is {gain:.3g} above it, not "
        f"more than the {asked:.3g} asked for"
    )


def _check(candidates: Sequence[C], plan: Plan[C]) -> None:
    if not candidates or any(c in candidates[:at] for at, c in enumerate(candidates)):
        raise ValueError("a search needs candidates, all different")
    budgets, keep = plan.budgets, plan.keep
    rising = all(a < b for a, b in zip((0.0, *budgets), budgets, strict=False))
    if not budgets or not rising:
        raise ValueError(f"budgets must be above 0 and rise, not {list(budgets)}")
    if len(keep) != len(budgets) - 1 or min(keep, default=1) < 1:
        raise ValueError(
            f"{len(budgets)} budgets need {len(budgets) - 1} counts of at least 1 to keep, not "
            f"{list(keep)}"
        )
