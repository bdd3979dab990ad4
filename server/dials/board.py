"""From the dials that a request sets to the biases that it gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from models.controls import Controls, Rule
from models.errors import NotAllowedError
from models.manifest import Manifest
from models.solver import Solution, Target
from server.dials.calibrations import Calibrations, Question
from server.dials.floors import Bounds, Side
from server.dials.overlay import Overlay, Sides, Wanted, path_of
from server.dials.protocol import REFUSAL_ONLY, DialOptions, RefusalOptions
from server.dials.reports import Forecast, forecast

_MOST_KEPT = 1024


@dataclass(frozen=True)
class Resolution:
    """The effective dials of one request.

    Attributes:
        controls: What the decision gets.
        forecast: What a calibration expects of them; None if no report is wanted.
        asked_rates: Categories whose dial is a rate, with the rate; without clamped dials.
        calibrated: Whether a bias or a bound depends on a calibration, and so on the checkpoint's
            own weights.
        clamped: Categories whose dial was moved to a bound of the policy, with the bound; in
            manifest order.
        replaced_decision: The requested rule, if the policy's floors replaced it by greedy.
    """

    controls: Controls
    forecast: Forecast | None = None
    asked_rates: tuple[tuple[str, float], ...] = ()
    calibrated: bool = False
    clamped: tuple[tuple[str, Side], ...] = ()
    replaced_decision: str | None = None


class DialBoard:
    """Resolves the dials of one policy's requests.

    Whatever a request sets, each resolved bias lies within the bounds.

    Args:
        manifest: The served checkpoint's.
        bounds: None lets requests move dials freely.

    Attributes:
        unasked: The dials of requests that set none.

    Raises:
        RequestError: The defaults cannot be met.
    """

    def __init__(
        self,
        manifest: Manifest,
        defaults: DialOptions,
        calibrations: Calibrations,
        bounds: Bounds | None = None,
    ) -> None:
        self.names = tuple(manifest.names)
        self.bounds = bounds or Bounds.none(len(self.names))
        self._reports = bool(defaults.report)
        self._solves = defaults.solves
        self._refusal_in = defaults.refusal_in or REFUSAL_ONLY
        self._calibrations = calibrations
        self._overlay = Overlay(manifest, defaults, calibrations, self.bounds)
        self._recent = lru_cache(_MOST_KEPT)(self._resolve)
        self.unasked = self.resolve(RefusalOptions())

    def reports(self, options: RefusalOptions) -> bool:
        """Returns whether a request wants a report."""
        return self._reports if options.report is None else options.report

    def refusal_in(self, options: RefusalOptions) -> tuple[str, ...]:
        """Returns the fields of a chat message that hold a refusal's text."""
        return options.refusal_in or self._refusal_in

    def resolve(self, options: RefusalOptions, *, explain: bool = False) -> Resolution:
        """Resolves one request; what needs a calibration or a forecast is kept in a cache.

        Args:
            explain: Whether to add a forecast, if a calibration is loaded.

        Raises:
            RequestError: A category or a calibration is unknown, a bound cannot be certified, rates
                or bounds are asked for under another rule than greedy, or the checkpoint cannot
                follow the rule.
            NotAllowedError: A dial lies beyond a bound of a policy that does not clamp.
        """
        if explain or options.solves or self._solves:
            return self._recent(options, explain)
        return self._resolve(options, explain=False)

    def _resolve(self, options: RefusalOptions, explain: bool) -> Resolution:
        wanted = self._overlay.wanted(options)
        question, sides, solution = wanted.question, wanted.sides, None
        explains = (
            explain and wanted.rule is Rule.GREEDY and question.calibration in self._calibrations
        )
        if wanted.solves:
            question, solution, sides = self._solved(question, sides)
            biases = solution.biases
        else:
            biases = tuple([0.0 if t is None else t.bias or 0.0 for t in question.targets])
            solution = self._calibrations.solve(question) if explains else None
        # Already true of every dial. Here so that a new kind of dial cannot pass a bound.
        biases = self.bounds.clamp_all(biases)
        self._check_allowed(wanted, sides)
        predicted = None
        if explains and solution is not None:
            name, total = question.calibration, question.total
            predicted = forecast(name, solution, wanted.asked, total, clamped=sides)
        return Resolution(
            Controls(wanted.rule, biases, tuple([t is not None for t in question.targets])),
            predicted,
            self._rates(question.targets) if wanted.solves else (),
            calibrated=wanted.solves or self.bounds.calibrated,
            clamped=self._clamped(sides),
            replaced_decision=wanted.replaced,
        )

    def _solved(self, question: Question, sides: Sides) -> tuple[Question, Solution, Sides]:
        """Solves until every bias lies within the bounds; a bias that was moved to one stays there.

        So the other rates are met beside the bounds, not beside the dials that were asked for.
        """
        sides = dict(sides)
        while True:
            solution = self._calibrations.solve(question)
            moved: dict[int, Target] = {}
            for c in _solved_for(question):
                bias, side = self.bounds.clamp(c, solution.biases[c])
                if side is not None:
                    sides[c] = side
                    moved[c] = Target(bias=bias)
            if not moved:
                return question, solution, sides
            targets = tuple(moved.get(c, target) for c, target in enumerate(question.targets))
            question = question._replace(targets=targets)

    def _check_allowed(self, wanted: Wanted, sides: Sides) -> None:
        if not (self.bounds.refuses and wanted.moves):
            return
        for name, side in self._clamped(sides):
            if (name, side) not in self.unasked.clamped:
                path = path_of(name)
                bound = self.bounds.describe(self.names.index(name), side)
                raise NotAllowedError(f"{path}: the policy allows {bound}", param=path)

    def _clamped(self, sides: Sides) -> tuple[tuple[str, Side], ...]:
        return tuple([(self.names[c], sides[c]) for c in sorted(sides)])

    def _rates(self, targets: Sequence[Target | None]) -> tuple[tuple[str, float], ...]:
        return tuple(
            (name, target.rate)
            for name, target in zip(self.names, targets, strict=True)
            if target is not None and target.rate is not None
        )


def _solved_for(question: Question) -> list[int]:
    """Returns the categories whose bias the solver finds; the question has the others'."""
    free = question.total is not None
    return [
        c
        for c, target in enumerate(question.targets)
        if (free if target is None else target.bias is None)
    ]
