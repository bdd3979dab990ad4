import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
from prometheus_client import REGISTRY

from server.dials.protocol import parse_options
from server.policies.book import ActivePolicy
from server.telemetry.fit import FitWatch, show_ages
from server.telemetry.recorder import MarginRecorder
from tests.server.boards import board, calibration
from tests.server.manifests import MANIFEST

NAMES = MANIFEST.names
SOON_S = 0.01


def shown(name: str, *, category: str | None = None, policy: str = "desk") -> float | None:
    labels = {"model_name": "", "calibration": "default", "policy": policy}
    if category is not None:
        labels["category"] = category
    return REGISTRY.get_sample_value(f"rheostat_calibration_{name}", labels)


def policy() -> ActivePolicy:
    dials = {"categories": {NAMES[0]: {"rate": 0.25}, NAMES[1]: "never"}}
    return ActivePolicy("desk", board(parse_options(dials), "default"))


@pytest.fixture
def recorder(tmp_path: Path) -> MarginRecorder:
    return MarginRecorder(tmp_path / "margins.json", 1.0, NAMES, "a" * 64)


def watching(
    recorder: MarginRecorder,
    steps: Sequence[tuple[Callable[[], None], Callable[[], bool]]],
    window_s: float = 3600,
) -> None:
    """Does each step and waits for what it shows, while the watch runs."""

    async def run() -> None:
        watch = FitWatch(
            recorder,
            {"default": calibration()},
            lambda: {"desk": policy()},
            every_s=SOON_S,
            window_s=window_s,
        )
        async with watch.watching():
            for do, done in steps:
                do()
                async with asyncio.timeout(20):
                    while not done():
                        await asyncio.sleep(SOON_S)

    asyncio.run(run())


def record(recorder: MarginRecorder, shift: float = 0.0, times: int = 10) -> None:
    """Records the calibration's own margins some times, spread within their bins."""
    random = Random(0)
    for row in calibration().margins.tolist() * times:
        recorder.add("desk", [margin + shift + random.uniform(0, 0.2) for margin in row])


def drifted() -> bool:
    distance = shown("distance", category=NAMES[0])
    limit = shown("distance_limit", category=NAMES[0])
    return distance is not None and limit is not None and distance > limit


def test_traffic_of_the_calibration_fits_and_is_refused_as_expected(
    recorder: MarginRecorder,
) -> None:
    watching(recorder, [(lambda: record(recorder), lambda: shown("recorded_decisions") == 1800)])

    assert not drifted()
    assert shown("asked_rate", category=NAMES[0]) == 0.25
    # 10 of the category's 40 prompts, of 180 in all.
    expected = shown("expected_share", category=NAMES[0])
    assert expected == pytest.approx(10 / 180, abs=0.01)
    assert shown("observed_share", category=NAMES[0]) == pytest.approx(expected, abs=0.01)
    assert shown("observed_share", category=NAMES[1]) == 0
    assert shown("asked_rate", category=NAMES[1]) is None
    assert (shown("checked_timestamp_seconds") or 0) > 1.7e9


def test_shifted_traffic_does_not_fit(recorder: MarginRecorder) -> None:
    watching(recorder, [(lambda: record(recorder, shift=40.0), drifted)])


def test_window_forgets_what_went_before(recorder: MarginRecorder) -> None:
    # Ten times as much that fits would hide what drifted.
    steps: list[tuple[Callable[[], None], Callable[[], bool]]] = [
        (lambda: record(recorder, times=100), lambda: not drifted()),
        (lambda: None, lambda: shown("recorded_decisions") is None),
        (lambda: record(recorder, shift=40.0), drifted),
    ]
    watching(recorder, steps, window_s=SOON_S)


def test_policy_that_is_gone_is_not_shown(recorder: MarginRecorder) -> None:
    recorder.add("gone", [0.0] * len(NAMES))
    watching(recorder, [(lambda: record(recorder), lambda: shown("recorded_decisions") == 1800)])
    assert shown("recorded_decisions", policy="gone") is None


def test_calibrations_age_is_shown() -> None:
    show_ages({"default": calibration()})
    name = "rheostat_calibration_created_timestamp_seconds"
    created = REGISTRY.get_sample_value(name, {"model_name": "", "calibration": "default"})
    assert created == calibration().info.created.timestamp()
