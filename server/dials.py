"""From what a request asks for to the biases that it gets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from models.controls import Controls, Rule
from models.errors import ConfigError, RequestError
from models.solver import Target
from server.calibrations import Calibrations, Question
from server.protocol import FIELD, RefusalOptions
from server.reports import Forecast, forecast

DEFAULT_CALIBRATION = "default"
# What vLLM's routes take where neither the request nor generation_config.json says one.
OPENAI_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Resolution:
    """The effective dials of one request.

    Attributes:
        controls: What the decision gets.
        forecast: What a calibration says of them; none where nobody asked.
        asked_rates: Categories whose dial is a rate, with the rate.
        calibrated: Whether a bias depends on a calibration, and so on the checkpoint's own weights.
        at: Gives these dials at another temperature; none where the temperature does not matter.
    """

    controls: Controls
    forecast: Forecast | None = None
    asked_rates: tuple[tuple[str, float], ...] = ()
    calibrated: bool = False
    at: "Callable[[float], Resolution] | None" = None


class DialBoard:
    """Lays requests' dials over the operator's and solves what is asked of a calibration.

    Args:
        names: The checkpoint's categories, in manifest order.
        defaults: The operator's dials.
        calibrations: The checkpoint's.
        temperature: Of requests that bring none.

    Raises:
        ConfigError: The defaults cannot be met.
    """

    def __init__(
        self,
        names: Sequence[str],
        defaults: RefusalOptions,
        calibrations: Calibrations,
        temperature: float = OPENAI_TEMPERATURE,
    ) -> None:
        self.names = tuple(names)
        self.defaults = defaults
        self.calibrations = calibrations
        self.temperature = temperature
        try:
            self.unasked = self.resolve(RefusalOptions())
        except RequestError as error:
            raise ConfigError(f"RHEOSTAT_DEFAULTS: {error.message}") from error

    def warmed_to(self, temperature: float) -> "DialBoard":
        """Returns the same board for a checkpoint with another default temperature."""
        return DialBoard(self.names, self.defaults, self.calibrations, temperature)

    def reports(self, options: RefusalOptions) -> bool:
        """Returns whether a request wants a report."""
        return bool(self.defaults.report if options.report is None else options.report)

    def resolve(
        self, options: RefusalOptions, temperature: float | None = None, *, explain: bool = False
    ) -> Resolution:
        """Resolves one request.

        Args:
            options: The request's.
            temperature: The request's, where it is known yet.
            explain: Whether a forecast is wanted where a calibration is loaded.

        Raises:
            RequestError: A category or a calibration is unknown, or a bound cannot be certified.
        """
        asked = {**self.defaults.categories, **options.categories}
        self._check_categories(asked)
        targets = tuple(asked.get(name) for name in self.names)
        name = self._calibration(options)
        total = options.false_refusal_rate
        if total is None:
            total = self.defaults.false_refusal_rate
        rule = Rule[(options.decision or self.defaults.decision or "greedy").upper()]
        if total is None and all(t is None or t.bias is not None for t in targets):
            resolution = Resolution(_plain(rule, targets))
            if not explain or name not in self.calibrations:
                return resolution
        else:
            self.calibrations.require(name, param=self._param(options, asked))
            resolution = Resolution(
                _plain(rule, targets), asked_rates=self._rates(targets), calibrated=True
            )
        question = Question(name, targets, rule, 0.0, total)
        if rule is not Rule.SAMPLE:
            return self._solved(resolution, question, explain)
        if temperature is None:
            temperature = self.temperature
        return self._sampled(resolution, question._replace(temperature=temperature), explain)

    def _solved(self, resolution: Resolution, question: Question, explain: bool) -> Resolution:
        solution = self.calibrations.solve(question)
        controls = resolution.controls
        if resolution.calibrated:
            controls = Controls(question.rule, solution.biases, solution.selected)
        predicted = None
        if explain:
            recalibration = self.calibrations.recalibration(question.calibration)
            predicted = forecast(
                question.calibration, solution, question.targets, question.total, recalibration
            )
        return replace(resolution, controls=controls, forecast=predicted)

    def _sampled(self, resolution: Resolution, question: Question, explain: bool) -> Resolution:
        solved = self._solved(resolution, question, explain)

        def at(temperature: float) -> Resolution:
            if temperature == question.temperature:
                return solved
            return self._sampled(resolution, question._replace(temperature=temperature), explain)

        return replace(solved, at=at)

    def _check_categories(self, asked: dict[str, Target]) -> None:
        for name in asked:
            if name not in self.names:
                raise RequestError(
                    f"{FIELD}.categories.{name}: this checkpoint has no such category; it has "
                    f"{', '.join(self.names)}",
                    param=f"{FIELD}.categories.{name}",
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
        return f"{FIELD}.categories.{rates[0]}" if rates else f"{FIELD}.false_refusal_rate"

    def _rates(self, targets: Sequence[Target | None]) -> tuple[tuple[str, float], ...]:
        return tuple(
            (name, target.rate)
            for name, target in zip(self.names, targets, strict=True)
            if target is not None and target.rate is not None
        )


def _plain(rule: Rule, targets: Sequence[Target | None]) -> Controls:
    biases = (0.0 if target is None or target.bias is None else target.bias for target in targets)
    return Controls(rule, tuple(biases), tuple(target is not None for target in targets))
