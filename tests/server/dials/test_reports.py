import json
import math

import pytest

from models.controls import Controls, Rule
from models.solver import Target
from server.dials.calibrations import Question
from server.dials.reports import build_report, forecast
from tests.server.boards import calibrations
from tests.server.contexts import AS_TRAINED

NAMES = ["safety", "humanizing"]
INF = math.inf


def test_report_by_hand() -> None:
    controls = Controls(Rule.GREEDY, (-2.0, 0.5), (True, True))
    report = build_report(NAMES, "humanizing", (math.log(3), -0.5), controls)
    assert report == {
        "refused": True,
        "category": "humanizing",
        "decisions": {
            "safety": {
                "probability": pytest.approx(0.75),
                "margin": pytest.approx(1.0986122886681098),
                "bias": -2.0,
                "refused": False,
            },
            "humanizing": {
                "probability": pytest.approx(0.3775406687981454),  # 1 / (1 + e^0.5)
                "margin": -0.5,
                "bias": 0.5,
                "refused": True,
            },
        },
    }


def test_report_is_json_with_infinite_biases_and_huge_margins() -> None:
    controls = Controls(Rule.GREEDY, (INF, -INF), (True, True))
    report = build_report(NAMES, None, (-2e4, 2e4), controls)
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["decisions"] == {
        "safety": {"probability": 0.0, "margin": -2e4, "bias": "always", "refused": True},
        "humanizing": {"probability": 1.0, "margin": 2e4, "bias": "never", "refused": False},
    }
    assert report["category"] is None


def test_forecast_stands_beside_each_category_and_above_them() -> None:
    targets = (Target(rate=0.25), None)
    question = Question("default", targets, None)
    solution = calibrations("default").solve(question)
    predicted = forecast("default", solution, targets, None)
    controls = Controls(Rule.GREEDY, solution.biases, (True, False))
    report = build_report(NAMES, None, (0.0, 0.0), controls, predicted)
    assert report["calibration"] == "default"
    expected = report["decisions"]["safety"]["expected"]
    assert expected["refusal_rate"] == 0.25
    # Clopper-Pearson for 10 of 40, from a table.
    assert expected["refusal_rate_interval"] == pytest.approx((0.1269, 0.4120), abs=1e-4)
    assert expected["false_refusal_rate"] == 0.0
    # None of 100: 1 - 0.025 ** (1 / 100).
    assert expected["false_refusal_rate_interval"] == pytest.approx((0.0, 0.0362), abs=1e-4)
    assert (expected["asked"], expected["reachable"]) == ({"rate": 0.25}, True)
    # As trained: 20 of the 40 margins are positive.
    assert report["decisions"]["humanizing"]["expected"]["refusal_rate"] == 0.5
    assert report["decisions"]["humanizing"]["expected"]["asked"] is None
    assert report["expected"]["false_refusal_rate"] == 0.0
    assert report["expected"]["asked"] is None


def test_report_without_a_calibration_says_nothing_of_one() -> None:
    controls = AS_TRAINED.controls
    report = build_report(NAMES, None, (0.0, 0.0), controls)
    assert set(report) == {"refused", "category", "decisions"}
    assert "expected" not in report["decisions"]["safety"]


def test_margins_that_are_no_numbers_are_null() -> None:
    report = build_report(NAMES, None, (math.nan, INF), AS_TRAINED.controls)
    values = json.loads(json.dumps(report, allow_nan=False))["decisions"]
    assert [(d["probability"], d["margin"]) for d in values.values()] == [(None, None)] * 2
