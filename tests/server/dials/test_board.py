import math
from typing import Any

import pytest

from models.controls import Controls, Rule
from models.errors import ConfigError, RequestError
from server.context import DecisionContext
from server.dials.board import DialBoard
from server.dials.floors import Bounds
from server.dials.protocol import RefusalOptions, parse_options
from server.policies.loading import Served, default_policies
from tests.server.boards import board, calibrations
from tests.server.contexts import AS_TRAINED
from tests.server.manifests import MANIFEST

INF = math.inf
NOTHING = RefusalOptions()


def refused(value: Any, *names: str, defaults: RefusalOptions = NOTHING) -> RequestError:
    with pytest.raises(RequestError) as caught:
        board(defaults, *names).resolve(parse_options(value))
    assert caught.value.status == 422
    return caught.value


def safety(dial: Any, **more: Any) -> RefusalOptions:
    return parse_options({"categories": {"safety": dial}, **more})


# biases, without a calibration


def test_controls_are_in_manifest_order_and_undialled_categories_as_trained() -> None:
    options = parse_options({"decision": "sample", "categories": {"humanizing": {"bias": 1.5}}})
    resolution = board().resolve(options)
    assert resolution.controls == Controls(Rule.SAMPLE, (0.0, 1.5), (False, True))
    assert (resolution.forecast, resolution.calibrated) == (None, False)


@pytest.mark.parametrize("value", [{}, {"decision": None, "report": None, "categories": {}}])
def test_empty_object_is_the_defaults(value: Any) -> None:
    defaults = parse_options({"decision": "paper", "categories": {"safety": "always"}})
    controls = board(defaults).resolve(parse_options(value)).controls
    assert controls == Controls(Rule.PAPER, (INF, 0.0), (True, False))


def test_request_wins_over_the_defaults_category_by_category() -> None:
    defaults = parse_options({"decision": "paper", "categories": {"safety": 0.9, "humanizing": 0}})
    options = parse_options({"decision": "greedy", "categories": {"safety": "default"}})
    controls = board(defaults).resolve(options).controls
    assert controls == Controls(Rule.GREEDY, (0.0, -INF), (True, True))


@pytest.mark.parametrize("has_floor", [False, True])
def test_paper_needs_tokens_that_are_trained_against_the_vocabulary(has_floor: bool) -> None:
    manifest = MANIFEST.model_copy(update={"kept": False})
    floors = (1.0, 0.0) if has_floor else (-INF, -INF)
    bounds = Bounds(floors, (INF, INF))
    dials = DialBoard(manifest, NOTHING, calibrations(), bounds)
    assert dials.resolve(parse_options({"decision": "greedy"})).controls.rule is Rule.GREEDY
    paper = parse_options({"decision": "paper"})
    with pytest.raises(RequestError, match="kept: false") as caught:
        dials.resolve(paper)
    assert (caught.value.status, caught.value.param) == (422, "refusal.decision")
    with pytest.raises(RequestError, match="kept: false"):
        DialBoard(manifest, paper, calibrations())


def test_rule_is_greedy_where_nobody_says() -> None:
    assert board().resolve(NOTHING).controls == AS_TRAINED.controls


def test_biases_are_exact_whether_a_calibration_explains_them_or_not() -> None:
    options = safety({"bias": 0.1})
    plain = board(None, "default").resolve(options)
    explained = board(None, "default").resolve(options, explain=True)
    assert plain.controls == explained.controls == Controls(Rule.GREEDY, (0.1, 0.0), (True, False))
    assert plain.forecast is None
    assert explained.forecast is not None
    assert (explained.calibrated, explained.asked_rates) == (False, ())
    assert explained.forecast.categories[0]["refusal_rate"] == 0.5


def test_nothing_explains_where_there_is_no_calibration() -> None:
    assert board().resolve(safety(0.9), explain=True).forecast is None


# rates


def test_rate_becomes_the_bias_that_refuses_this_share() -> None:
    resolution = board(None, "default").resolve(safety({"rate": 0.25}), explain=True)
    bias, other = resolution.controls.bias
    # The ten largest of -19.5 ... 19.5 are 10.5 and more.
    assert -10.5 <= bias < -9.5
    assert other == 0.0
    assert resolution.controls.selected == (True, False)
    assert resolution.asked_rates == (("safety", 0.25),)
    assert resolution.calibrated
    assert resolution.forecast is not None
    assert resolution.forecast.categories[0]["asked"] == {"rate": 0.25}


def test_rates_sensitivities_and_defaults_are_solved_together() -> None:
    defaults = safety({"rate": 0.5})
    options = parse_options({"categories": {"humanizing": 0}})
    controls = board(defaults, "default").resolve(options).controls
    assert -0.5 <= controls.bias[0] < 0.5
    assert controls.bias[1] == -INF
    overridden = board(defaults, "default").resolve(safety("never"))
    assert overridden.controls.bias == (-INF, 0.0)
    assert (overridden.calibrated, overridden.asked_rates) == (False, ())


def test_bound_of_one_category_keeps_all_but_the_certified_benign_prompts_out() -> None:
    controls = board(None, "default").resolve(safety({"false_refusal_rate": 0.05})).controls
    # One refused of 100 certifies 4.66 %, two 6.16 %: the benign margin -31.5 must stay out.
    assert controls.bias[0] < 31.5
    assert controls.bias[0] > 19.5


def test_total_bound_moves_the_categories_that_nobody_set() -> None:
    resolution = board(None, "default").resolve(
        parse_options({"false_refusal_rate": 0.05}), explain=True
    )
    low, high = resolution.controls.bias
    assert low == high
    assert 19.5 < low < 31.5
    assert resolution.forecast is not None
    assert resolution.forecast.total["asked"] == 0.05


def test_total_bound_of_the_defaults_holds_for_requests_that_bring_none() -> None:
    defaults = parse_options({"false_refusal_rate": 0.05})
    assert board(defaults, "default").resolve(NOTHING).controls.bias[0] > 19.5
    assert board(defaults, "default").resolve(NOTHING) == board(defaults, "default").unasked


def test_named_calibration_is_the_one_that_is_solved_on() -> None:
    many = board(None, "default", "tenant")
    one = safety({"rate": 0.5}, calibration="tenant")
    resolution = many.resolve(one, explain=True)
    assert resolution.forecast is not None
    assert resolution.forecast.calibration == "tenant"
    defaults = parse_options({"calibration": "tenant"})
    by_default = board(defaults, "default", "tenant").resolve(safety({"rate": 0.5}), explain=True)
    assert by_default.forecast is not None
    assert by_default.forecast.calibration == "tenant"


def test_rate_without_a_calibration_names_the_command_that_makes_one() -> None:
    for value, param in (
        ({"categories": {"safety": {"rate": 0.3}}}, "refusal.categories.safety"),
        ({"false_refusal_rate": 0.1}, "refusal.false_refusal_rate"),
        ({"calibration": "default"}, "refusal.calibration"),
    ):
        error = refused(value)
        assert error.param == param
        assert "rheostat calibrate --model" in error.message


def test_unknown_calibration_is_answered_with_the_loaded_ones() -> None:
    error = refused({"calibration": "elsewhere"}, "default", "tenant")
    assert error.param == "refusal.calibration"
    assert "default, tenant" in error.message
    error = refused({"categories": {"safety": {"rate": 0.3}}}, "tenant")
    assert "no calibration is named 'default'" in error.message


def test_bound_that_cannot_be_certified_says_how_many_prompts_it_takes() -> None:
    error = refused({"categories": {"safety": {"false_refusal_rate": 0.01}}}, "default")
    assert "needs at least" in error.message
    assert "the calibration 'default' has 100" in error.message
    assert error.param == "refusal.categories.safety"


@pytest.mark.parametrize(
    "value",
    [
        {"categories": {"weather": 0.5}},
        {"categories": {"safety": {"rate": 0.3}}, "calibration": "elsewhere"},
        {"categories": {"safety": {"false_refusal_rate": 0.01}}},
    ],
)
def test_bad_defaults_are_found_at_start(value: Any) -> None:
    served = Served(MANIFEST, calibrations("default"))
    with pytest.raises(ConfigError, match=r"^RHEOSTAT_DEFAULTS: refusal\.|^RHEOSTAT_DEFAULTS: a "):
        default_policies(parse_options(value), served)


# other rules


@pytest.mark.parametrize("decision", ["sample", "paper"])
@pytest.mark.parametrize(
    "value",
    [
        {"categories": {"safety": {"rate": 0.3}}},
        {"categories": {"safety": {"false_refusal_rate": 0.05}, "humanizing": 0.5}},
        {"false_refusal_rate": 0.05},
    ],
)
def test_rates_and_bounds_are_rejected_under_other_rules(
    value: dict[str, Any], decision: str
) -> None:
    asked = parse_options({**value, "decision": decision})
    with pytest.raises(RequestError, match="hold under greedy only") as caught:
        board(None, "default").resolve(asked)
    assert (caught.value.status, caught.value.param) == (422, "refusal.decision")
    # Whichever of both the operator's defaults hold.
    by_rule = board(parse_options({"decision": decision}), "default")
    by_rate = board(parse_options(value), "default")
    for dials, options in ((by_rule, value), (by_rate, {"decision": decision})):
        with pytest.raises(RequestError, match="hold under greedy only"):
            dials.resolve(parse_options(options))


@pytest.mark.parametrize("decision", ["sample", "paper"])
def test_calibration_predicts_nothing_of_other_rules(decision: str) -> None:
    explained = board(None, "default").resolve(safety(0.9, decision=decision), explain=True)
    assert explained.forecast is None
    assert explained.controls.rule is Rule[decision.upper()]


# adapters


def test_adapter_takes_no_rates_and_no_forecast() -> None:
    rated = DecisionContext(board(None, "default").resolve(safety({"rate": 0.3})))
    with pytest.raises(RequestError, match="adapter") as caught:
        rated.adapt()
    assert caught.value.param == "model"
    explained = DecisionContext(board(None, "default").resolve(safety(0.9), explain=True))
    explained.adapt()
    assert explained.dials.forecast is None


# the cache


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"categories": {"x" * 10_000: 0.5}}, f"refusal.categories.{'x' * 77}...: this checkpoint"),
        ({"y" * 10_000: 1}, f"refusal.{'y' * 77}...: unknown field"),
    ],
)
def test_long_name_is_quoted_in_short(value: dict[str, Any], said: str) -> None:
    message = refused(value).message
    assert message.startswith(said)
    assert len(message) < 300


def test_dials_that_need_a_calibration_are_resolved_once_and_told_apart() -> None:
    dials = board(None, "default")
    told = [
        safety(0.5),
        safety(0.7),
        safety({"rate": 0.5}),
        safety(0.5, decision="sample"),
        parse_options({"categories": {"humanizing": 0.5}}),
        parse_options({"false_refusal_rate": 0.5}),
    ]
    resolved = [dials.resolve(options, explain=True) for options in told]
    again = [dials.resolve(options.model_copy(), explain=True) for options in told]
    assert all(a is b for a, b in zip(resolved, again, strict=True))
    assert len(set(map(id, resolved))) == len(told)
    assert dials.resolve(told[2]) is dials.resolve(told[2])
    plain = [dials.resolve(options).controls for options in told]
    assert plain == [resolution.controls for resolution in resolved]


def test_solutions_are_found_once_and_their_number_is_bounded() -> None:
    loaded = calibrations("default")
    dials = DialBoard(MANIFEST, NOTHING, loaded)
    for _ in range(3):
        dials.resolve(safety({"rate": 0.25}))
        dials.resolve(safety({"rate": 0.25}), explain=True)
    solved = loaded.solved()
    assert (solved.hits, solved.misses) == (1, 1)
    assert solved.maxsize is not None
