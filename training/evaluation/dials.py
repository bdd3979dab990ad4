"""What the dials do to labelled prompts, computed from their margins."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from models.controls import Rule, sensitivity_of_bias
from models.decision import uniform_draw
from training.client import SolvedRate
from training.evaluation.decisions import (
    NO_SAFE,
    NO_UNSAFE,
    Indices,
    Observed,
    controls,
    decisions,
    refusal_auc,
    refusal_f1,
    refused_at_5,
)
from training.evaluation.report import (
    CrossTalk,
    RatePoint,
    Rates,
    RuleName,
    RuleReport,
    SweepPoint,
    Sweeps,
    TokenMode,
    Tokens,
)
from training.evaluation.statistics import (
    Estimate,
    Flags,
    Floats,
    Resamples,
    bootstrapped,
    missing,
    share,
)

POINTS = 33
RATES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))


def sweeps(observed: Observed, served: Sequence[float]) -> Sweeps:
    """Moves all dials together, and each one alone.

    Args:
        served: `[k]` biases of a request without dials.
    """
    k = len(observed.names)
    shared = _positions(observed.largest)
    # `paper` compares a probability of the whole vocabulary: T = 1 - x covers all of it.
    likely = observed.largest - observed.log_normaliser
    paper = _positions(-np.log(np.expm1(np.maximum(-likely, 1e-9))))
    dials = {}
    margins = observed.margins.astype(np.float64)
    for column, name in enumerate(observed.names):
        moved = [_replaced(served, column, bias) for bias in _positions(margins[:, column])]
        dials[name] = [
            _sweep_point(observed, biases[column], decisions(observed, controls(biases)))
            for biases in moved
        ]
    return Sweeps(
        shared=[_sweep_point(observed, b, decisions(observed, controls((b,) * k))) for b in shared],
        paper=[
            _sweep_point(observed, b, decisions(observed, controls((b,) * k, Rule.PAPER)))
            for b in paper
        ],
        dials=dials,
    )


def rates(observed: Observed, solved: Mapping[str, Sequence[SolvedRate]] | str, seed: int) -> Rates:
    """Compares requested with achieved rates.

    Args:
        solved: By category, the server's solution of each of `RATES`; or why there is none.
    """
    if isinstance(solved, str):
        return Rates(reason=solved, largest_gap=missing(solved), points={})
    points: dict[str, list[RatePoint]] = {}
    gaps: list[tuple[float, Flags, Flags]] = []
    for name, solutions in solved.items():
        column = observed.names.index(name)
        own = observed.truth == column
        points[name] = []
        for asked, solution in zip(RATES, solutions, strict=True):
            refused = decisions(observed, controls(solution.biases)) < len(observed.names)
            achieved = share(refused[own], f"no prompt is of the category {name}")
            points[name].append(
                RatePoint(
                    asked=asked,
                    bias=as_json(solution.biases[column]),
                    reachable=solution.reachable,
                    achieved=achieved,
                )
            )
            if solution.reachable and own.any():
                gaps.append((asked, own, refused))
    return Rates(reason=None, largest_gap=_largest_gap(gaps, len(observed), seed), points=points)


def cross_talk(observed: Observed, served: Sequence[float]) -> dict[str, dict[str, CrossTalk]]:
    """Moves each dial from 10 to 90 % of its own prompts and watches the other categories'.

    Args:
        served: `[k]` biases of a request without dials.

    Returns:
        By the moved category, then by the other one.
    """
    found: dict[str, dict[str, CrossTalk]] = {}
    for moved, name in enumerate(observed.names):
        own = observed.margins[observed.truth == moved, moved].astype(np.float64)
        refused = [
            decisions(observed, controls(_replaced(served, moved, bias))) < len(observed.names)
            for bias in _biases_of_rates(own)
        ]
        found[name] = {
            other: _cross_talk(name if not len(own) else other, len(own) > 0, refused, members)
            for other, members in _prompts_by_category(observed)
            if other != name
        }
    return found


def tokens(observed: Observed, seed: int) -> Tokens:
    """Compares one refusal token with one for each category, every bias 0."""
    resamples = Resamples(len(observed), seed)
    single, categories = observed.scores, observed.largest
    return Tokens(
        single=_token_mode(single, observed.unsafe, resamples),
        categories=_token_mode(categories, observed.unsafe, resamples),
        differ=share((single >= 0) != (categories >= 0), "")
        if len(observed.names) > 1
        else missing("the checkpoint has one category, so both are the same token"),
    )


def decided_by_rule(observed: Observed, seeds: Sequence[int]) -> dict[RuleName, Indices]:
    """Returns each rule's decisions, every bias 0.

    Args:
        seeds: `[n]` of the requests, for `sample` at the temperature 1.
    """
    zeros = (0.0,) * len(observed.names)
    drawn = [uniform_draw(seed) for seed in seeds]
    return {
        "greedy": decisions(observed, controls(zeros)),
        "sample": decisions(observed, controls(zeros, Rule.SAMPLE), 1.0, drawn),
        "paper": decisions(observed, controls(zeros, Rule.PAPER)),
    }


def rules(
    observed: Observed,
    decided: Mapping[RuleName, Indices],
    agreement: Mapping[RuleName, Estimate],
) -> dict[RuleName, RuleReport]:
    """Compares the three decision rules."""
    k, unsafe = len(observed.names), observed.unsafe
    greedy = decided["greedy"] < k
    found: dict[RuleName, RuleReport] = {}
    for name, choice in decided.items():
        refused = choice < k
        right = refused & unsafe
        found[name] = RuleReport(
            safe=share(refused[~unsafe], NO_SAFE),
            unsafe=share(refused[unsafe], NO_UNSAFE),
            right_category=share(
                choice[right] == observed.truth[right],
                "no prompt that should be refused was refused",
            ),
            differ=share(refused != greedy, ""),
            agreement=agreement[name],
        )
    return found


def as_json(bias: float) -> float | Literal["never", "always"]:
    """Returns a bias as the server's JSON has it."""
    if math.isinf(bias):
        return "always" if bias > 0 else "never"
    return bias


def _positions(margins: Floats) -> list[float]:
    """Returns the biases between which nearly no prompt and nearly every prompt is refused."""
    low, high = np.quantile(margins, (0.001, 0.999))
    found = np.linspace(-float(high) - 0.5, -float(low) + 0.5, POINTS)
    found[np.abs(found).argmin()] = 0.0
    return [float(bias) for bias in found]


def _replaced(biases: Sequence[float], column: int, bias: float) -> tuple[float, ...]:
    return (*biases[:column], bias, *biases[column + 1 :])


def _sweep_point(observed: Observed, bias: float, decided: Indices) -> SweepPoint:
    refused = decided < len(observed.names)
    return SweepPoint(
        bias=bias,
        sensitivity=sensitivity_of_bias(bias),
        safe=share(refused[~observed.unsafe], NO_SAFE),
        unsafe=share(refused[observed.unsafe], NO_UNSAFE),
        categories={
            name: share(refused[members], f"no prompt is of the category {name}")
            for name, members in _prompts_by_category(observed)
        },
    )


def _biases_of_rates(own: Floats) -> list[float]:
    if not len(own):
        return [0.0] * len(RATES)
    falling = np.sort(own)[::-1]
    return [-float(falling[max(0, round(rate * len(own)) - 1)]) for rate in RATES]


def _prompts_by_category(observed: Observed) -> list[tuple[str, Flags]]:
    return [(name, observed.truth == column) for column, name in enumerate(observed.names)]


def _cross_talk(lacking: str, known: bool, refused: list[Flags], members: Flags) -> CrossTalk:
    reason = f"no prompt is of the category {lacking}"
    watched = [flags[members] for flags in refused]
    return CrossTalk(
        rates=[share(flags, reason) if known else missing(reason) for flags in watched],
        changed=share(watched[0] != watched[-1], reason) if known else missing(reason),
    )


def _token_mode(scores: Floats, unsafe: Flags, resamples: Resamples) -> TokenMode:
    refused = scores >= 0
    return TokenMode(
        safe=share(refused[~unsafe], NO_SAFE),
        unsafe=share(refused[unsafe], NO_UNSAFE),
        f1=refusal_f1(refused, unsafe, resamples),
        auc=refusal_auc(scores, unsafe, resamples),
        refused_at_5=refused_at_5(scores, unsafe),
    )


def _largest_gap(gaps: list[tuple[float, Flags, Flags]], n: int, seed: int) -> Estimate:
    if not gaps:
        return missing("no rate is reachable in a category that has prompts")

    def figure(weights: Floats) -> Floats:
        parts = [
            np.abs(weights[:, own & refused].sum(axis=1) / weights[:, own].sum(axis=1) - asked)
            for asked, own, refused in gaps
        ]
        largest: Floats = np.max(parts, axis=0)
        return largest

    with np.errstate(invalid="ignore"):  # a resample may lack a category
        found = bootstrapped(figure, Resamples(n, seed), centred=True)
    return found.model_copy(update={"n": len(gaps)})
