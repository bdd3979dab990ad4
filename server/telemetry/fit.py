"""Whether the calibrations still fit the traffic, tested every few minutes by the server itself."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from math import ceil
from typing import NamedTuple

from models.calibration import Calibration
from models.drift import DriftReport, Reference, check, reference
from models.histogram import share_refused
from server.background import repeated
from server.policies.book import ActivePolicy
from server.policies.credentials import now
from server.telemetry import metrics
from server.telemetry.recorder import Counts, MarginRecorder

# A test looks back so far: what went before would hide what changed.
WINDOW_S = 24 * 3600.0


class Fit(NamedTuple):
    """One test: a calibration against the margins of one policy's traffic."""

    calibration: str
    policy: ActivePolicy
    report: DriftReport


class FitWatch:
    """Tests recorded margins against each calibration, in a thread, and shows the results.

    Counts that the recorder's file had before the start belong to the window until it has passed.

    Args:
        recorder: Counts margins.
        calibrations: By name.
        policies: Returns those in force, by name.
        every_s: Pause between two tests.
        window_s: How far a test looks back.
    """

    def __init__(
        self,
        recorder: MarginRecorder,
        calibrations: Mapping[str, Calibration],
        policies: Callable[[], Mapping[str, ActivePolicy]],
        *,
        every_s: float,
        window_s: float = WINDOW_S,
    ) -> None:
        self._recorder = recorder
        self._references = {name: _reference(found) for name, found in calibrations.items()}
        self._policies = policies
        self._every_s = every_s
        self._past: deque[dict[str, Counts]] = deque([{}], maxlen=max(1, ceil(window_s / every_s)))

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Tests for as long as the block runs."""
        async with repeated(self._look, self._every_s, finishes=False):
            yield

    async def _look(self, _: bool) -> None:
        fits = await asyncio.to_thread(list, self._tests(self._recent()))
        for gauge in metrics.FIT:
            gauge.clear()  # a policy may be gone
        for fit in fits:
            _show(fit)

    def _recent(self) -> list[tuple[ActivePolicy, Counts]]:
        counts, past = self._recorder.counts(), self._past[0]
        self._past.append(counts)
        policies = self._policies()
        recent = {name: counts[name] - past.get(name, 0) for name in counts if name in policies}
        return [(policies[name], each) for name, each in recent.items() if each.any()]

    def _tests(self, recent: Iterable[tuple[ActivePolicy, Counts]]) -> Iterator[Fit]:
        for policy, counts in recent:
            observed = dict(zip(policy.board.names, counts, strict=True))
            for name, calibrated in self._references.items():
                yield Fit(name, policy, check(calibrated, observed))


def show_ages(calibrations: Mapping[str, Calibration]) -> None:
    """Shows when each calibration was measured."""
    for name, calibration in calibrations.items():
        created = calibration.info.created.timestamp()
        metrics.child(metrics.CALIBRATION_CREATED, name).set(created)


def _reference(calibration: Calibration) -> Reference:
    return reference(calibration.margins, calibration.category, calibration.names)


def _show(fit: Fit) -> None:
    policy, report = fit.policy, fit.report
    labels = (fit.calibration, policy.name)
    metrics.series(metrics.CALIBRATION_CHECKED, *labels).set(now().timestamp())
    metrics.series(metrics.CALIBRATION_ROWS, *labels).set(report.rows)
    unasked = policy.board.unasked
    for c, test in enumerate(report.categories):
        each, bias = (*labels, test.category), unasked.controls.bias[c]
        values = (
            (metrics.CALIBRATION_DISTANCE, test.distance),
            (metrics.CALIBRATION_LIMIT, test.limit),
            (metrics.CALIBRATION_OBSERVED, share_refused(report.observed[c], bias)),
            (metrics.CALIBRATION_EXPECTED, share_refused(report.expected[c], bias)),
        )
        for gauge, value in values:
            metrics.series(gauge, *each).set(value)
    for category, rate in unasked.asked_rates:
        metrics.series(metrics.CALIBRATION_ASKED, *labels, category).set(rate)
