"""A request's dials over the operator's: the question for the calibration, and the rule."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from models.controls import Rule
from models.errors import NotAllowedError, RequestError, shortened
from models.manifest import Manifest
from models.solver import Target
from server.dials.calibrations import DEFAULT_CALIBRATION, Calibrations, Question
from server.dials.floors import Bounds, Side
from server.dials.protocol import FIELD, DialOptions, RefusalOptions

# Which categories were moved to a bound, by index.
Sides = Mapping[int, Side]


class Wanted(NamedTuple):
    """What one request wants; its plain biases lie within the bounds.

    Attributes:
        rule: The effective rule.
        question: For the calibration.
        asked: The dials before they were moved to a bound, in manifest order.
        sides: The plain biases that were moved to a bound.
        solves: Whether the biases need the calibration; otherwise only a forecast does.
        moves: Whether the request itself sets dials; otherwise all are the policy's.
        replaced: The requested rule, if the policy's floors replaced it by greedy.
    """

    rule: Rule
    question: Question
    asked: tuple[Target | None, ...]
    sides: Sides
    solves: bool
    moves: bool
    replaced: str | None


class Overlay:
    """Merges requests' dials into the operator's.

    Args:
        manifest: The served checkpoint's.
    """

    def __init__(
        self,
        manifest: Manifest,
        defaults: DialOptions,
        calibrations: Calibrations,
        bounds: Bounds,
    ) -> None:
        self._names = tuple(manifest.names)
        self._known = frozenset(manifest.names)
        self._kept = manifest.kept
        self._defaults = defaults
        self._calibrations = calibrations
        self._bounds = bounds

    def wanted(self, options: RefusalOptions) -> Wanted:
        """Returns what a request wants.

        Raises:
            RequestError: A category or a calibration is unknown, rates or bounds are asked for
                under another rule than greedy, or the checkpoint cannot follow the rule.
            NotAllowedError: It asks for another rule beside floors, and the policy does not clamp.
        """
        named = {**self._defaults.categories, **options.categories}
        if not self._known.issuperset(named):
            raise self._unknown(named)
        asked = tuple(map(named.get, self._names))
        total = options.false_refusal_rate
        if total is None:
            total = self._defaults.false_refusal_rate
        calibration = self._calibration(options)
        solves = total is not None or None in [target.bias for target in named.values()]
        if solves:
            self._calibrations.require(calibration, param=self._param(options, named))
        rule, replaced = self._rule(options)
        if solves and rule is not Rule.GREEDY:
            raise RequestError(
                f"{FIELD}.decision: rates and false refusal rates hold under greedy only: leave "
                "the decision out, or ask for sensitivities or biases",
                param=f"{FIELD}.decision",
            )
        targets, sides = self._bounded(asked, rests=total is None)
        question = Question(calibration, targets, total)
        return Wanted(rule, question, asked, sides, solves, options.moves_dials, replaced)

    def _unknown(self, asked: Iterable[str]) -> RequestError:
        path = path_of(shortened(next(name for name in asked if name not in self._known)))
        return RequestError(
            f"{path}: this checkpoint has no such category; it has {', '.join(self._names)}",
            param=path,
        )

    def _calibration(self, options: RefusalOptions) -> str:
        name = options.calibration or self._defaults.calibration
        if name is not None:
            self._calibrations.require(name, param=f"{FIELD}.calibration")
        return name or DEFAULT_CALIBRATION

    def _param(self, options: RefusalOptions, asked: Mapping[str, Target]) -> str:
        if options.calibration or self._defaults.calibration:
            return f"{FIELD}.calibration"
        rates = [name for name, target in asked.items() if target.bias is None]
        return path_of(rates[0]) if rates else f"{FIELD}.false_refusal_rate"

    def _rule(self, options: RefusalOptions) -> tuple[Rule, str | None]:
        asked = options.decision or self._defaults.decision or "greedy"
        if asked == "paper" and not self._kept:
            raise RequestError(
                f"{FIELD}.decision: paper compares control tokens with the whole vocabulary, and "
                "this checkpoint's are trained against each other only (kept: false): use greedy "
                "or sample",
                param=f"{FIELD}.decision",
            )
        # Only under greedy is a refusal independent of the temperature, the draw and the other
        # dials.
        if asked == "greedy" or not self._bounds.has_floor:
            return Rule[asked.upper()], None
        if self._bounds.refuses:
            raise NotAllowedError(
                f"{FIELD}.decision: the policy has floors, which hold under greedy only",
                param=f"{FIELD}.decision",
            )
        return Rule.GREEDY, asked

    def _bounded(
        self, asked: Sequence[Target | None], *, rests: bool
    ) -> tuple[tuple[Target | None, ...], Sides]:
        """Moves plain biases within their bounds, those of unset categories included.

        Args:
            asked: In manifest order.
            rests: Whether unset categories stay as trained; otherwise a total bound moves them.
        """
        if self._bounds.allow_all:
            return tuple(asked), {}
        targets: list[Target | None] = []
        sides: dict[int, Side] = {}
        for c, target in enumerate(asked):
            if target is None and rests and self._bounds.unset(c) != 0:
                target = Target(bias=self._bounds.unset(c))
            elif target is not None and target.bias is not None:
                bias, side = self._bounds.clamp(c, target.bias)
                if side is not None:
                    sides[c] = side
                    target = Target(bias=bias)
            targets.append(target)
        return tuple(targets), sides


def path_of(category: str) -> str:
    """Returns the path of a category's dial in a request."""
    return f"{FIELD}.categories.{category}"
