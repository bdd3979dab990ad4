import json
import math
from typing import Any

import pytest

from models.controls import Controls, Rule
from models.errors import RequestError
from server.protocol import (
    RefusalOptions,
    build_report,
    parse_dial,
    parse_options,
    resolve_controls,
)

NAMES = ["safety", "humanizing"]
INF = math.inf


def refused(value: Any) -> RequestError:
    """Returns what the whole way from the wire to the controls refuses a value with."""
    with pytest.raises(RequestError) as caught:
        resolve_controls(parse_options(value), RefusalOptions(), NAMES)
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
        (2, "between 0 and 1"),
        (math.nan, "finite number"),
        (INF, "finite number"),
        (-INF, "finite number"),
        (10**400, "finite number"),
        ("0.5", "never, default, always"),
        ("Never", "never, default, always"),
        ("", "never, default, always"),
        ("\ud800", "never, default, always"),
        ("x" * 10_000, "never, default, always"),
        (True, "finite number"),
        (False, "finite number"),
        (None, "finite number"),
        ([], "finite number"),
        ([0.5], "finite number"),
        ({}, "exactly one of sensitivity, bias"),
        ({"bias": 1.0, "sensitivity": 0.5}, "exactly one of sensitivity, bias"),
        ({"threshold": 0.5}, "got ['threshold']"),
        ({"bias": 1.0, "colour": "red"}, "exactly one of"),
        ({"\ud800": 1}, "exactly one of"),
        ({"sensitivity": 1.2}, "between 0 and 1"),
        ({"sensitivity": "never"}, "finite number"),
        ({"sensitivity": None}, "finite number"),
        ({"sensitivity": math.nan}, "finite number"),
        ({"bias": "1"}, "finite number"),
        ({"bias": True}, "finite number"),
        ({"bias": None}, "finite number"),
        ({"bias": {}}, "finite number"),
        ({"bias": math.nan}, "finite number"),
        ({"bias": INF}, "finite number"),
        ({"bias": -INF}, "finite number"),
        ({"bias": -(10**400)}, "finite number"),
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
        ("x", "refusal"),
        (5, "refusal"),
        (None, "refusal"),
        (False, "refusal"),
        ({"policy": "x"}, "refusal.policy"),
        ({"Categories": {}}, "refusal.Categories"),
        ({"decision": "thermal"}, "refusal.decision"),
        ({"decision": "GREEDY"}, "refusal.decision"),
        ({"decision": 0}, "refusal.decision"),
        ({"report": "yes"}, "refusal.report"),
        ({"report": 1}, "refusal.report"),
        ({"categories": []}, "refusal.categories"),
        ({"categories": None}, "refusal.categories"),
        ({"categories": "safety"}, "refusal.categories"),
        ({"categories": {"weather": 0.5}}, "refusal.categories.weather"),
        ({"categories": {"Safety": 0.5}}, "refusal.categories.Safety"),
        ({"categories": {"": 0.5}}, "refusal.categories."),
    ],
)
def test_wrong_object_is_refused_with_the_path_of_the_field(value: Any, param: str) -> None:
    assert refused(value).param == param


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    assert "safety, humanizing" in refused({"categories": {"weather": 0.5}}).message
    assert "decision, report, categories" in refused({"policy": "x"}).message


def test_key_that_is_no_text_is_refused() -> None:
    assert refused({"\ud800": 1}).param == "refusal"


@pytest.mark.parametrize(
    ("dial", "bias"),
    [
        (0, -INF),
        (0.0, -INF),
        (0.5, 0.0),
        (0.75, math.log(3)),
        (1, INF),
        (1.0, INF),
        ("never", -INF),
        ("default", 0.0),
        ("always", INF),
        ({"sensitivity": 0.25}, -math.log(3)),
        ({"sensitivity": 0}, -INF),
        ({"bias": -2.0}, -2.0),
        ({"bias": 3}, 3.0),
        ({"bias": 0}, 0.0),
    ],
)
def test_right_dial_gives_its_bias(dial: Any, bias: float) -> None:
    assert parse_dial(dial) == pytest.approx(bias, rel=1e-12)


def test_controls_are_in_manifest_order_and_undialled_categories_as_trained() -> None:
    options = parse_options({"decision": "sample", "categories": {"humanizing": {"bias": 1.5}}})
    controls = resolve_controls(options, RefusalOptions(), NAMES)
    assert controls == Controls(Rule.SAMPLE, (0.0, 1.5), (False, True))


@pytest.mark.parametrize("value", [{}, {"decision": None, "report": None, "categories": {}}])
def test_empty_object_is_the_defaults(value: Any) -> None:
    defaults = parse_options({"decision": "paper", "categories": {"safety": "always"}})
    controls = resolve_controls(parse_options(value), defaults, NAMES)
    assert controls == Controls(Rule.PAPER, (INF, 0.0), (True, False))


def test_request_wins_over_the_defaults_category_by_category() -> None:
    defaults = parse_options({"decision": "paper", "categories": {"safety": 0.9, "humanizing": 0}})
    options = parse_options({"decision": "greedy", "categories": {"safety": "default"}})
    controls = resolve_controls(options, defaults, NAMES)
    assert controls == Controls(Rule.GREEDY, (0.0, -INF), (True, True))


def test_rule_is_greedy_where_nobody_says() -> None:
    controls = resolve_controls(RefusalOptions(), RefusalOptions(), NAMES)
    assert controls == Controls.as_trained(2)


def test_parsing_leaves_the_clients_object_alone() -> None:
    value = {"categories": {"safety": {"sensitivity": 0.5}}}
    parse_options(value)
    assert value == {"categories": {"safety": {"sensitivity": 0.5}}}


def test_report_by_hand() -> None:
    controls = Controls(Rule.GREEDY, (-2.0, 0.5), (True, True))
    report = build_report(NAMES, "humanizing", (math.log(3), -0.5), controls)
    assert report.model_dump() == {
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
    text = json.dumps(report.model_dump(), allow_nan=False)
    assert json.loads(text)["decisions"] == {
        "safety": {"probability": 0.0, "margin": -2e4, "bias": "always", "refused": True},
        "humanizing": {"probability": 1.0, "margin": 2e4, "bias": "never", "refused": False},
    }
    assert report.category is None
