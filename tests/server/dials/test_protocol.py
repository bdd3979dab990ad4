import math
from typing import Any

import pytest

from models.errors import RequestError
from models.solver import Target
from server.dials.protocol import parse_dial, parse_options
from tests.server.boards import board

INF = math.inf


def refused(value: Any) -> RequestError:
    """Returns what the whole way from the wire to the controls refuses a value with."""
    with pytest.raises(RequestError) as caught:
        board().resolve(parse_options(value))
    error = caught.value
    assert error.status == 422
    assert error.param is not None
    assert error.message.startswith(f"{error.param}: ")
    error.message.encode()  # quotes nothing that UTF-8 cannot hold
    return error


@pytest.mark.parametrize(
    ("dial", "said"),
    [
        (1.2, "between 0 and 1"),
        (-0.1, "between 0 and 1"),
        (math.nan, "finite number"),
        (INF, "finite number"),
        (10**400, "finite number"),
        ("0.5", "never, default, always"),
        ("Never", "never, default, always"),
        ("", "never, default, always"),
        ("\ud800", "never, default, always"),
        ("x" * 10_000, "never, default, always"),
        (True, "finite number"),
        (None, "finite number"),
        ([0.5], "finite number"),
        ({}, "exactly one of sensitivity, bias"),
        ({"bias": 1.0, "sensitivity": 0.5}, "exactly one of sensitivity, bias"),
        ({"threshold": 0.5}, "got ['threshold']"),
        ({"\ud800": 1}, "exactly one of"),
        ({"sensitivity": 1.2}, "between 0 and 1"),
        ({"sensitivity": "never"}, "finite number"),
        ({"bias": "1"}, "finite number"),
        ({"bias": True}, "finite number"),
        ({"bias": math.nan}, "finite number"),
        ({"bias": INF}, "finite number"),
        ({"bias": -INF}, "finite number"),
        ({"bias": -(10**400)}, "finite number"),
        ({"rate": 1.01}, "between 0 and 1"),
        ({"rate": -0.01}, "between 0 and 1"),
        ({"rate": "0.3"}, "finite number"),
        ({"rate": 0.3, "false_refusal_rate": 0.1}, "exactly one of"),
        ({"false_refusal_rate": 1}, "below 1"),
        ({"false_refusal_rate": -0.01}, "between 0 and 1"),
        ({"false_refusal_rate": INF}, "finite number"),
    ],
)
def test_wrong_dial_is_refused_with_its_path(dial: Any, said: str) -> None:
    error = refused({"categories": {"humanizing": dial}})
    assert error.param == "refusal.categories.humanizing"
    assert said in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "refusal"),
        ({"\ud800": 1}, "refusal"),
        (None, "refusal"),
        ({"policy": 5}, "refusal.policy"),
        ({"Categories": {}}, "refusal.Categories"),
        ({"decision": "thermal"}, "refusal.decision"),
        ({"decision": "GREEDY"}, "refusal.decision"),
        ({"report": "yes"}, "refusal.report"),
        ({"report": 1}, "refusal.report"),
        ({"refusal_in": "content"}, "refusal.refusal_in"),
        ({"refusal_in": []}, "refusal.refusal_in"),
        ({"refusal_in": ["content"]}, "refusal.refusal_in"),
        ({"refusal_in": ["refusal", "refusal"]}, "refusal.refusal_in"),
        ({"refusal_in": ["refusal", "body"]}, "refusal.refusal_in"),
        ({"categories": []}, "refusal.categories"),
        ({"categories": None}, "refusal.categories"),
        ({"categories": {"weather": 0.5}}, "refusal.categories.weather"),
        ({"categories": {"": 0.5}}, "refusal.categories."),
        ({"false_refusal_rate": 1.0}, "refusal.false_refusal_rate"),
        ({"false_refusal_rate": -0.1}, "refusal.false_refusal_rate"),
        ({"false_refusal_rate": "0.1"}, "refusal.false_refusal_rate"),
        ({"calibration": 5}, "refusal.calibration"),
        ({"calibration": ""}, "refusal.calibration"),
        ({"calibration": "../default"}, "refusal.calibration"),
        ({"calibration": "x" * 65}, "refusal.calibration"),
    ],
)
def test_wrong_object_is_refused_with_the_path_of_the_field(value: Any, param: str) -> None:
    assert refused(value).param == param


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    assert "safety, humanizing" in refused({"categories": {"weather": 0.5}}).message
    assert "decision, report, refusal_in, categories" in refused({"polcy": "x"}).message


@pytest.mark.parametrize(
    ("dial", "bias"),
    [
        (0, -INF),
        (0.5, 0.0),
        (0.75, math.log(3)),
        (1, INF),
        ("never", -INF),
        ("default", 0.0),
        ("always", INF),
        ({"sensitivity": 0.25}, -math.log(3)),
        ({"sensitivity": 0}, -INF),
        ({"bias": -2.0}, -2.0),
        ({"bias": 3}, 3.0),
    ],
)
def test_right_dial_gives_its_bias(dial: Any, bias: float) -> None:
    target = parse_dial(dial)
    assert (target.rate, target.false_refusal_rate) == (None, None)
    assert target.bias == pytest.approx(bias, rel=1e-12)


@pytest.mark.parametrize(
    ("dial", "target"),
    [
        ({"rate": 0.3}, Target(rate=0.3)),
        ({"rate": 1}, Target(rate=1.0)),
        ({"false_refusal_rate": 0.01}, Target(false_refusal_rate=0.01)),
        ({"false_refusal_rate": 0}, Target(false_refusal_rate=0.0)),
    ],
)
def test_rates_are_targets(dial: Any, target: Target) -> None:
    assert parse_dial(dial) == target
