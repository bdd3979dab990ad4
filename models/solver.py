"""From "refuse 30 % of these" to the biases that do it, under the rule ``greedy``.

Pure: a calibration's margins and the targets go in, biases and expected rates come out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from models.calibration import Calibration
from models.confidence import intervals, prompts_needed, refusals_allowed
from models.errors import RequestError
from models.thresholds import Doubles, ThresholdRule

Interval = tuple[float, float]

# How near a rate must come to the one asked for to count as reached.
REACHED_WITHIN = 0.005

_TOTAL = "refusal.false_refusal_rate"
# Rates and the common bias hardly touch each other: two or three rounds are usual.
_ROUNDS = 12
# In log-odds: it moves no probability by more than 0.025 points.
_STANDSTILL = 1e-3
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Target:
    """The target of one category: exactly one of the three. Hashable.

    Attributes:
        bias: Added to the refusal logit; may be infinite.
        rate: Share of the category's own prompts to be refused, by any token; 0..1.
        false_refusal_rate: Upper bound, with 95 % confidence, of the share of benign prompts that
            the category's own rule refuses; 0..1, 1 excluded.

    Raises:
        ValueError: Not exactly one is given, or it is out of range.
    """

    bias: float | None = None
    rate: float | None = None
    false_refusal_rate: float | None = None

    def __post_init__(self) -> None:
        bias, rate, limit = self.bias, self.rate, self.false_refusal_rate
        if (bias is None) + (rate is None) + (limit is None) != 2:
            raise ValueError("a target is one of bias, rate, false_refusal_rate, and only one")
        if bias is not None and math.isnan(bias):
            raise ValueError("a target is a number, not NaN")
        if rate is not None and not 0 <= rate <= 1:
            raise ValueError(f"a rate lies between 0 and 1, got {rate}")
        if limit is not None:
            _check_limit(limit)


@dataclass(frozen=True)
class Expected:
    """What to expect of one category's traffic, if it is like the calibration's.

    Attributes:
        rate: Share of the category's own calibration prompts refused, by any token.
        prompts: How many these are.
        false_refusal_rate: Share of the benign prompts that the category's own rule refuses;
            None where the calibration has no benign prompts.
        benign: How many these are.
        reachable: Whether the target is met: a rate within half a point (never a rate of 1, which
            no sample can promise), a false refusal rate by a certified bound.
        asked: The target's rate or false refusal rate, or None.
    """

    rate: float
    prompts: int
    false_refusal_rate: float | None
    benign: int
    reachable: bool
    asked: float | None

    @cached_property
    def rate_interval(self) -> Interval:
        """95 % interval of the rate (Clopper-Pearson)."""
        return _interval(self.rate, self.prompts)

    @cached_property
    def false_refusal_interval(self) -> Interval | None:
        """95 % interval of the false refusal rate."""
        share = self.false_refusal_rate
        return None if share is None else _interval(share, self.benign)


@dataclass(frozen=True)
class Solution:
    """Biases that meet the targets, and what to expect of them. All in manifest order.

    Attributes:
        biases: Each exactly an fp32 number, or infinite.
        expected: By category.
        total_false_refusal_rate: Share of the benign prompts refused by any token; None
            where the calibration has no benign prompts.
    """

    biases: tuple[float, ...]
    expected: tuple[Expected, ...]
    total_false_refusal_rate: float | None

    @cached_property
    def total_false_refusal_interval(self) -> Interval | None:
        """95 % interval of the total."""
        share = self.total_false_refusal_rate
        return None if share is None else _interval(share, self.expected[0].benign)


def solve(
    calibration: Calibration,
    targets: Mapping[str, Target],
    total_false_refusal_rate: float | None = None,
) -> Solution:
    """Finds the biases that meet every target together.

    Args:
        calibration: Its prompts are the sample of the traffic.
        targets: By category name. A missing category keeps the bias 0, or takes part in the common
            shift where a total is asked for.
        total_false_refusal_rate: Upper bound, with 95 % confidence, of the share of benign prompts
            refused by any token. The categories without a target share one bias, the
            largest that keeps it.

    Raises:
        RequestError: A bound cannot be certified from so few benign prompts, or by the categories
            that are free to move.
        ValueError: A target names a category that the calibration does not know.
    """
    for name in sorted(targets):
        calibration.column(name)
    if total_false_refusal_rate is not None:
        _check_limit(total_false_refusal_rate)
    by_index = {c: targets[n] for c, n in enumerate(calibration.names) if n in targets}
    free = [c for c in range(len(calibration.names)) if c not in by_index]
    if total_false_refusal_rate is None:
        free = []
    solver = threshold_rule(calibration)
    bias = np.zeros(len(calibration.names))
    for c, target in by_index.items():
        bias[c] = _alone(calibration, solver, c, target)
    rates = {c: t.rate for c, t in by_index.items() if t.rate is not None}
    if total_false_refusal_rate is None:
        bias = solver.meet(rates, bias) if rates else bias
    else:
        limit = _total_limit(calibration, by_index, total_false_refusal_rate)
        bias = _meet_total(calibration, solver, rates, free, bias, limit)
    return _solution(calibration, solver, by_index, bias)


def warm_up(calibration: Calibration) -> None:
    """Imports and sorts now, so that the first request of a calibration need not."""
    solution = solve(calibration, {calibration.names[0]: Target(rate=0.5)})
    intervals(solution.expected[0].rate, 1)
    if calibration.benign:
        refusals_allowed(calibration.benign, 0.5)


def bias_alone(calibration: Calibration, category: str, target: Target) -> float:
    """Returns the bias that meets one category's target by its own token, all others off.

    Other dials can only add refusals. So this bias, or a larger one, refuses at least the target's
    rate of the category's calibration prompts, whatever the other dials are: what a floor needs. A
    false refusal rate is about the category's own rule in any case.

    Args:
        calibration: Its prompts are the sample of the traffic.
        category: Its name.
        target: A rate is met to the nearest prompt.

    Raises:
        RequestError: A bound cannot be certified from so few benign prompts.
        ValueError: The calibration does not know the category.
    """
    if target.bias is not None:
        calibration.column(category)
        return float(np.float32(target.bias))
    others = {name: Target(bias=-math.inf) for name in calibration.names if name != category}
    solution = solve(calibration, {**others, category: target})
    return solution.biases[calibration.column(category)]


class _Limit(NamedTuple):
    """How many benign prompts may be refused, and what that certifies."""

    allowed: int
    rate: float


def _check_limit(limit: float) -> None:
    if not 0 <= limit < 1:
        raise ValueError(f"a false refusal rate lies between 0 and 1, below 1, got {limit}")


@lru_cache(maxsize=16)
def threshold_rule(calibration: Calibration) -> ThresholdRule:
    """Returns a calibration's margins, laid out for solving."""
    return ThresholdRule(calibration.margins, calibration.category)


def _alone(calibration: Calibration, solver: ThresholdRule, category: int, target: Target) -> float:
    """Returns the bias of a target that needs no other's; for a rate, where solving starts."""
    if target.bias is not None:
        return float(np.float32(target.bias))
    if target.rate is not None:
        return float(np.float32(solver.alone(category, target.rate)))
    assert target.false_refusal_rate is not None
    if target.false_refusal_rate == 0:
        return -math.inf
    param = f"refusal.categories.{calibration.names[category]}"
    allowed = _allowed(calibration, target.false_refusal_rate, param)
    return solver.own_bias(category, allowed)


def _allowed(calibration: Calibration, limit: float, param: str) -> int:
    n = calibration.benign
    allowed = refusals_allowed(n, limit) if n else -1
    if allowed < 0:
        raise RequestError(
            f"a false refusal rate of {limit:g} needs at least {prompts_needed(limit, n)} benign "
            f"prompts to be certain of, the calibration {calibration.info.name!r} has {n}",
            param=param,
        )
    return allowed


def _total_limit(calibration: Calibration, targets: Mapping[int, Target], limit: float) -> _Limit:
    if limit == 0:
        return _Limit(0, limit)
    # Every threshold that was put at a benign prompt costs that prompt: the thresholds together
    # cut off (refused + cuts) of Tukey's statistically equivalent blocks.
    cuts = sum(bool(target.false_refusal_rate) for target in targets.values())
    allowed = _allowed(calibration, limit, _TOTAL) - cuts
    return _Limit(allowed, limit)


def _meet_total(
    calibration: Calibration,
    solver: ThresholdRule,
    rates: Mapping[int, float],
    free: list[int],
    bias: Doubles,
    limit: _Limit,
) -> Doubles:
    """Moves rates and the common bias in turn; the bias moves last, because it is bounded."""
    for _ in range(_ROUNDS):
        before = bias
        bias = solver.meet(rates, bias) if rates else bias.copy()
        shift = _shift(solver, free, bias, limit, calibration.benign)
        if shift is None:
            held = bias.copy()
            held[free] = -math.inf
            share = solver.total_false(held) if calibration.benign else 1.0
            raise RequestError(
                f"the dials that are set one by one already refuse {share:.2%} of the "
                f"{calibration.benign} benign prompts of the calibration "
                f"{calibration.info.name!r}; at most {max(limit.allowed, 0)} prompts may be "
                f"refused to be certain of {limit.rate:g} in total",
                param=_TOTAL,
            )
        bias[free] = shift
        if not rates or _stand_still(before.tolist(), bias.tolist()):
            break
    return bias


def _stand_still(before: list[float], after: list[float]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(old == new or abs(old - new) <= _STANDSTILL for old, new in pairs)


def _shift(
    solver: ThresholdRule, free: list[int], bias: Doubles, limit: _Limit, benign: int
) -> float | None:
    if limit.rate == 0:
        held = np.delete(bias, free)
        return -math.inf if (held == -math.inf).all() else None
    if free:
        return solver.shift(free, bias, limit.allowed)
    return 0.0 if solver.total_false(bias) * benign <= limit.allowed + _ROUNDING else None


def _solution(
    calibration: Calibration,
    solver: ThresholdRule,
    targets: Mapping[int, Target],
    bias: Doubles,
) -> Solution:
    k, benign = len(bias), calibration.benign
    shares = solver.shares(bias).tolist()
    own_falses = solver.own_falses(bias).tolist() if benign else [None] * k
    return Solution(
        biases=tuple(bias.tolist()),
        expected=tuple(
            Expected(
                rate=shares[c],
                prompts=calibration.prompts[name],
                false_refusal_rate=own_falses[c],
                benign=benign,
                reachable=_reached(targets.get(c), shares[c]),
                asked=_asked(targets.get(c)),
            )
            for c, name in enumerate(calibration.names)
        ),
        total_false_refusal_rate=shares[k] if benign else None,
    )


# Reports need several, scipy takes 25 µs for each, and a calibration has few different shares.
@lru_cache(maxsize=4096)
def _interval(share: float, n: int) -> Interval:
    low, high = intervals(share * n, n)
    return float(low), float(high)


def _reached(target: Target | None, rate: float) -> bool:
    asked = target.rate if target else None
    return asked is None or (asked < 1 and abs(rate - asked) <= REACHED_WITHIN + _ROUNDING)


def _asked(target: Target | None) -> float | None:
    if target is None:
        return None
    return target.false_refusal_rate if target.rate is None else target.rate
