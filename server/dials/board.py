"""From what a request asks for to the biases that it gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from models.controls import Controls, Rule
from models.errors import NotAllowedError, RequestError, shortened
from models.solver import Solution, Target
from server.dials.calibrations import Calibrations, Question
from server.dials.floors import Bounds, Side
from server.dials.protocol import FIELD, DialOptions, RefusalOptions
from server.dials.reports import Forecast, forecast

DEFAULT_CALIBRATION = "default"
_MOST_KEPT = 1024

# Which categories were moved to a bound, by index.
Sides = Mapping[int, Side]


@dataclass(frozen=True)
class Resolution:
    """The effective dials of one request.

    Attributes:
        controls: What the decision gets.
        forecast: What a calibration says of them; none where nobody asked.
        asked_rates: Categories whose dial is a rate that is in force, with the rate.
        calibrated: Whether a bias or a bound depends on a calibration, and so on the checkpoint's
            own weights.
        clamped: Categories whose dial would have left the policy's bounds, with the bound that it
            was moved to; in manifest order.
        replaced_decision: The rule that was asked for, where the policy's floors demand greedy.
    """

    controls: Controls
    forecast: Forecast | None = None
    asked_rates: tuple[tuple[str, float], ...] = ()
    calibrated: bool = False
    clamped: tuple[tuple[str, Side], ...] = ()
    replaced_decision: str | None = None


class _Wanted(NamedTuple):
    """What is to be solved for one request, its plain biases within the bounds already.

    Attributes:
        rule: How the token is chosen.
        question: For the calibration.
        asked: The dials as they were asked for, in manifest order.
        sides: Plain biases that were moved to a bound.
        solves: Whether the biases need the calibration; else only an explanation could.
        explain: Whether a forecast is wanted.
        moves: Whether the request itself moves dials; else all is the policy's own doing.
        replaced: The rule that was asked for, where it is not the effective one.
    """

    rule: Rule
    question: Question
    asked: tuple[Target | None, ...]
    sides: Sides
    solves: bool
    explain: bool
    moves: bool
    replaced: str | None


class DialBoard:
    """Lays requests' dials over the operator's and solves what is asked of a calibration.

    Whatever a request asks for, each bias that leaves here lies within the bounds.

    Args:
        names: The checkpoint's categories, in manifest order.
        defaults: The operator's dials.
        calibrations: The checkpoint's.
        bounds: The operator's floors and ceilings; none: requests move dials freely.

    Raises:
        RequestError: The defaults cannot be met.
    """

    def __init__(
        self,
        names: Sequence[str],
        defaults: DialOptions,
        calibrations: Calibrations,
        bounds: Bounds | None = None,
    ) -> None:
        self.names = tuple(names)
        self.defaults = defaults
        self.calibrations = calibrations
        self.bounds = bounds or Bounds.none(len(self.names))
        self._lately = lru_cache(_MOST_KEPT)(self._resolve)
        self.unasked = self.resolve(RefusalOptions())

    def reports(self, options: RefusalOptions) -> bool:
        """Returns whether a request wants a report."""
        return bool(self.defaults.report if options.report is None else options.report)

    def resolve(self, options: RefusalOptions, *, explain: bool = False) -> Resolution:
        """Resolves one request; what was asked lately is not resolved again.

        Args:
            options: The request's.
            explain: Whether a forecast is wanted where a calibration is loaded.

        Raises:
            RequestError: A category or a calibration is unknown, a bound cannot be certified, or
                rates or bounds are to be decided by another rule than greedy.
            NotAllowedError: The request asks for more or less than the policy allows, and the
                policy does not clamp.
        """
        return self._lately(options, explain)

    def _resolve(self, options: RefusalOptions, explain: bool) -> Resolution:
        return self._resolved(self._wanted(options, explain))

    def _wanted(self, options: RefusalOptions, explain: bool) -> _Wanted:
        named = {**self.defaults.categories, **options.categories}
        self._check_categories(named)
        asked = tuple(named.get(name) for name in self.names)
        total = options.false_refusal_rate
        if total is None:
            total = self.defaults.false_refusal_rate
        calibration = self._calibration(options)
        solves = total is not None or any(t is not None and t.bias is None for t in asked)
        if solves:
            self.calibrations.require(calibration, param=self._param(options, named))
        rule, replaced = self._rule(options)
        if solves and rule is not Rule.GREEDY:
            raise RequestError(
                f"{FIELD}.decision: rates and false refusal rates hold under greedy only: leave "
                "the decision out, or ask for sensitivities or biases",
                param=f"{FIELD}.decision",
            )
        targets, sides = self._held(asked, rests=total is None)
        return _Wanted(
            rule,
            Question(calibration, targets, total),
            asked,
            sides,
            solves,
            explain and rule is Rule.GREEDY and calibration in self.calibrations,
            options.moves_dials,
            replaced,
        )

    def _rule(self, options: RefusalOptions) -> tuple[Rule, str | None]:
        asked = options.decision or self.defaults.decision or "greedy"
        # Only under greedy does a bias promise that what it refuses stays refused whatever the
        # temperature, the draw and the other dials are.
        if asked == "greedy" or not self.bounds.has_floor:
            return Rule[asked.upper()], None
        if self.bounds.refuses:
            raise NotAllowedError(
                f"{FIELD}.decision: the policy has floors, which hold under greedy only",
                param=f"{FIELD}.decision",
            )
        return Rule.GREEDY, asked

    def _held(
        self, asked: Sequence[Target | None], *, rests: bool
    ) -> tuple[tuple[Target | None, ...], Sides]:
        """Moves plain biases to their bounds, and those that nobody sets to where they rest.

        Args:
            asked: In manifest order.
            rests: Whether what nobody sets stays as trained; else a total bound moves it.
        """
        targets: list[Target | None] = []
        sides: dict[int, Side] = {}
        for c, target in enumerate(asked):
            if target is None and rests and self.bounds.resting(c) != 0:
                target = Target(bias=self.bounds.resting(c))
            elif target is not None and target.bias is not None:
                bias, side = self.bounds.hold(c, target.bias)
                if side is not None:
                    sides[c] = side
                    target = Target(bias=bias)
            targets.append(target)
        return tuple(targets), sides

    def _resolved(self, wanted: _Wanted) -> Resolution:
        question, sides = wanted.question, wanted.sides
        solution = None
        if wanted.solves:
            question, solution, sides = self._solved(question, sides)
            biases = self.bounds.held(solution.biases)
        else:
            biases = _plain(question)
            if wanted.explain:
                solution = self.calibrations.solve(question)
        clamped = tuple((self.names[c], sides[c]) for c in sorted(sides))
        self._refuse_outside(wanted, clamped)
        predicted = None
        if wanted.explain and solution is not None:
            name = question.calibration
            predicted = forecast(
                name,
                solution,
                wanted.asked,
                question.total,
                clamped=sides,
            )
        named = tuple(target is not None for target in question.targets)
        return Resolution(
            Controls(wanted.rule, biases, named),
            predicted,
            self._rates(question.targets) if wanted.solves else (),
            calibrated=wanted.solves or self.bounds.calibrated,
            clamped=clamped,
            replaced_decision=wanted.replaced,
        )

    def _solved(self, question: Question, sides: Sides) -> tuple[Question, Solution, Sides]:
        """Solves until nothing lies outside the bounds; what was moved to one stays there.

        So the rates that can be met are met beside the bounds, not beside what was asked.
        """
        sides = dict(sides)
        while True:
            solution = self.calibrations.solve(question)
            moved: dict[int, Target] = {}
            for c in _solved_for(question):
                bias, side = self.bounds.hold(c, solution.biases[c])
                if side is not None:
                    sides[c] = side
                    moved[c] = Target(bias=bias)
            if not moved:
                return question, solution, sides
            targets = tuple(moved.get(c, target) for c, target in enumerate(question.targets))
            question = question._replace(targets=targets)

    def _refuse_outside(self, wanted: _Wanted, clamped: tuple[tuple[str, Side], ...]) -> None:
        if not (self.bounds.refuses and wanted.moves):
            return
        for name, side in clamped:
            if (name, side) not in self.unasked.clamped:
                raise NotAllowedError(self._beyond(name, side), param=_path(name))

    def _beyond(self, name: str, side: Side) -> str:
        c = self.names.index(name)
        bound = self.bounds.floors[c] if side == "floor" else self.bounds.ceilings[c]
        less = "less" if side == "floor" else "more"
        shown = {math.inf: "always", -math.inf: "never"}.get(bound, f"a bias of {bound:.6g}")
        return f"{_path(name)}: the policy allows no {less} than its {side}, {shown}"

    def _check_categories(self, asked: dict[str, Target]) -> None:
        for name in asked:
            if name not in self.names:
                path = _path(shortened(name))
                raise RequestError(
                    f"{path}: this checkpoint has no such category; it has {', '.join(self.names)}",
                    param=path,
                )

    def _calibration(self, options: RefusalOptions) -> str:
        name = options.calibration or self.defaults.calibration
        if name is not None:
            self.calibrations.require(name, param=f"{FIELD}.calibration")
        return name or DEFAULT_CALIBRATION

    def _param(self, options: RefusalOptions, asked: dict[str, Target]) -> str:
        if options.calibration or self.defaults.calibration:
            return f"{FIELD}.calibration"
        rates = [name for name, target in asked.items() if target.bias is None]
        return _path(rates[0]) if rates else f"{FIELD}.false_refusal_rate"

    def _rates(self, targets: Sequence[Target | None]) -> tuple[tuple[str, float], ...]:
        return tuple(
            (name, target.rate)
            for name, target in zip(self.names, targets, strict=True)
            if target is not None and target.rate is not None
        )


def _path(category: str) -> str:
    return f"{FIELD}.categories.{category}"


def _solved_for(question: Question) -> list[int]:
    """Returns the categories whose bias the solver finds; the others' stand in the question."""
    free = question.total is not None
    return [
        c
        for c, target in enumerate(question.targets)
        if (free if target is None else target.bias is None)
    ]


def _plain(question: Question) -> tuple[float, ...]:
    return tuple(
        0.0 if target is None or target.bias is None else target.bias for target in question.targets
    )
