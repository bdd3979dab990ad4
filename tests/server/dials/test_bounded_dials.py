"""No dial of a request leaves its policy's floors and ceilings, whichever way it is turned."""

import itertools
import math
from typing import Any

import pytest

from models.controls import Controls, Rule
from models.errors import NotAllowedError, RequestError
from server.context import DecisionContext
from server.dials.board import DialBoard, Resolution
from server.dials.floors import Bounds
from server.dials.protocol import DialOptions, RefusalOptions, parse_header, parse_options
from tests.server.boards import calibrations
from tests.server.manifests import MANIFEST

INF = math.inf
NOTHING = RefusalOptions()
FLOORED = Bounds((1.0, -INF), (INF, INF))
CEILED = Bounds((-INF, -INF), (-1.0, INF))


def bounded(bounds: Bounds, defaults: DialOptions = NOTHING, *names: str) -> DialBoard:
    """Returns a board with calibrations: `default` and `tenant` unless others are named."""
    loaded = calibrations(*(names or ("default", "tenant")))
    return DialBoard(MANIFEST, defaults, loaded, bounds)


def resolved(bounds: Bounds, value: Any, **more: Any) -> Resolution:
    return bounded(bounds).resolve(parse_options(value), **more)


def safety(dial: Any, **more: Any) -> dict[str, Any]:
    return {"categories": {"safety": dial}, **more}


# every way to ask for less than a floor

BELOW = [
    safety({"bias": 0.999}),
    safety({"bias": -3.4e38}),
    safety({"bias": -1e308}),
    safety({"sensitivity": 0.7}),
    safety({"sensitivity": 0}),
    safety(0.0),
    safety(5e-324),
    safety("never"),
    safety("default"),
    safety({"rate": 0}),
    safety({"rate": 0.3}),
    safety({"rate": 0.5}),
    safety({"false_refusal_rate": 0}),
    safety({"rate": 0.3}, calibration="tenant"),
    {"categories": {"humanizing": {"rate": 0.3}, "safety": {"rate": 0.1}}},
    {"categories": {"humanizing": "never", "safety": "never"}, "false_refusal_rate": 0.05},
]


@pytest.mark.parametrize("value", BELOW, ids=str)
@pytest.mark.parametrize("decision", [None, "greedy", "sample", "paper"])
@pytest.mark.parametrize("explain", [False, True])
def test_nothing_that_a_request_asks_lowers_a_floor(
    value: dict[str, Any], decision: str | None, explain: bool
) -> None:
    asked = {**value, **({"decision": decision} if decision else {})}
    resolution = resolved(FLOORED, asked, explain=explain)
    assert resolution.controls.bias[0] == 1.0
    assert resolution.controls.rule is Rule.GREEDY
    assert resolution.clamped == (("safety", "floor"),)
    assert resolution.replaced_decision == (None if decision in (None, "greedy") else decision)


@pytest.mark.parametrize("value", BELOW, ids=str)
def test_where_the_policy_says_so_it_is_refused_instead(value: dict[str, Any]) -> None:
    bounds = Bounds(FLOORED.floors, FLOORED.ceilings, refuses=True)
    with pytest.raises(NotAllowedError, match="no less than its floor, a bias of 1") as caught:
        resolved(bounds, value)
    assert (caught.value.status, caught.value.param) == (403, "refusal.categories.safety")


def test_header_form_is_held_too() -> None:
    for text in ("safety=never", "safety=bias:-5", "safety=rate:0.1", "safety=0"):
        assert resolved(FLOORED, parse_header(text)).controls.bias[0] == 1.0


def test_category_that_a_request_does_not_name_keeps_its_floor_unreported() -> None:
    for value in ({}, {"report": True}, {"categories": {"humanizing": "never"}}):
        resolution = resolved(FLOORED, value)
        assert resolution.controls.bias[0] == 1.0
        assert resolution.clamped == ()
    strict = Bounds(FLOORED.floors, FLOORED.ceilings, refuses=True)
    assert resolved(strict, {"categories": {"humanizing": "never"}}).controls.bias == (1.0, -INF)


def test_other_categories_move_freely_below_and_above() -> None:
    for dial in ("never", "always", 0.3, {"bias": -7}):
        asked = {"categories": {"humanizing": dial}}
        free = DialBoard(MANIFEST, NOTHING, calibrations()).resolve(parse_options(asked))
        assert resolved(FLOORED, asked).controls.bias == (1.0, free.controls.bias[1])


def test_more_than_the_floor_is_given_as_asked() -> None:
    for dial, bias in ((0.9, math.log(9)), ("always", INF), ({"bias": 1.0}, 1.0)):
        resolution = resolved(FLOORED, safety(dial))
        assert resolution.controls.bias[0] == pytest.approx(bias)
        assert resolution.clamped == ()
    rated = resolved(FLOORED, safety({"rate": 0.9}))
    assert 15.5 <= rated.controls.bias[0] <= 16.5  # 36 of the 40 margins: -15.5 and above
    assert rated.clamped == ()


def test_floor_as_the_request_asks_for_it_is_not_clamped() -> None:
    # Also where the solver rounds the request's bias to fp32.
    for sensitivity in (0.1, 0.6, 0.7, 0.8, 0.9):
        dial = parse_options(safety(sensitivity)).categories["safety"]
        assert dial.bias is not None
        floor = Bounds((dial.bias, -INF), (INF, INF))
        both = {"categories": {"safety": sensitivity, "humanizing": {"rate": 0.3}}}
        assert resolved(floor, safety(sensitivity)).clamped == ()
        assert resolved(floor, both).clamped == ()


def test_decision_asked_beside_floors_is_refused_where_the_policy_does_not_clamp() -> None:
    bounds = Bounds(FLOORED.floors, FLOORED.ceilings, refuses=True)
    for rule in ("sample", "paper"):
        with pytest.raises(NotAllowedError, match="greedy") as caught:
            resolved(bounds, {"decision": rule})
        assert caught.value.param == "refusal.decision"
    assert resolved(bounds, {"decision": "greedy"}).controls.rule is Rule.GREEDY


def test_decision_stays_free_without_floors() -> None:
    assert resolved(CEILED, {"decision": "sample"}).controls.rule is Rule.SAMPLE
    assert resolved(CEILED, {"decision": "paper"}).controls.rule is Rule.PAPER


# ceilings

ABOVE = [
    safety({"bias": -0.999}),
    safety({"bias": 1e308}),
    safety(0.5),
    safety(1),
    safety("default"),
    safety("always"),
    safety({"rate": 1}),
    safety({"rate": 0.6}),
    safety({"false_refusal_rate": 0.05}),
    {"false_refusal_rate": 0.05},
]


@pytest.mark.parametrize("value", ABOVE, ids=str)
@pytest.mark.parametrize("decision", ["greedy", "sample", "paper"])
def test_nothing_that_a_request_asks_raises_a_ceiling(value: dict[str, Any], decision: str) -> None:
    asked = {**value, "decision": decision}
    if decision != "greedy" and "rate" in str(value):
        with pytest.raises(RequestError, match="hold under greedy only"):
            resolved(CEILED, asked)
        return
    resolution = resolved(CEILED, asked)
    assert resolution.controls.bias[0] <= -1.0
    assert resolution.clamped == (("safety", "ceiling"),)


def test_category_under_a_ceiling_is_selected_so_that_the_papers_rule_reads_its_bias() -> None:
    # A category that nobody selects keeps the model's own choice under that rule.
    resolution = resolved(CEILED, {"decision": "paper"})
    assert resolution.controls == Controls(Rule.PAPER, (-1.0, 0.0), (True, False))


def test_pinned_category_cannot_be_moved_at_all() -> None:
    pinned = Bounds((2.0, -INF), (2.0, INF))
    for dial in ("never", "always", 0.5, {"rate": 0.1}, {"rate": 1}):
        assert resolved(pinned, safety(dial)).controls.bias[0] == 2.0


# every combination at once, against the promise itself

DIALS: tuple[Any, ...] = (
    None,
    "never",
    "always",
    0.5,
    {"bias": -20},
    {"rate": 0.2},
    {"rate": 0.95},
    {"false_refusal_rate": 0.05},
)


@pytest.mark.parametrize("total", [None, 0.05, 0.5])
@pytest.mark.parametrize("decision", ["greedy", "sample", "paper"])
def test_every_combination_of_dials_ends_within_the_bounds(
    total: float | None, decision: str
) -> None:
    board = bounded(Bounds((0.5, -INF), (8.0, 6.0)))
    solved = 0
    for first, second in itertools.product(DIALS, repeat=2):
        dials = {"safety": first, "humanizing": second}
        value: dict[str, Any] = {
            "decision": decision,
            "categories": {name: dial for name, dial in dials.items() if dial is not None},
        }
        if total is not None:
            value["false_refusal_rate"] = total
        try:
            resolution = board.resolve(parse_options(value), explain=True)
        except RequestError:  # a total that cannot be kept beside what is set
            assert total is not None
            continue
        solved += 1
        low, other = resolution.controls.bias
        assert 0.5 <= low <= 8.0
        assert other <= 6.0
        assert resolution.controls.rule is Rule.GREEDY
    assert solved > 30


# what is solved beside a bound


def test_rates_that_can_be_met_are_met_beside_what_was_clamped() -> None:
    asked = {"categories": {"safety": {"rate": 0.1}, "humanizing": {"rate": 0.3}}}
    resolution = resolved(FLOORED, asked, explain=True)
    assert resolution.clamped == (("safety", "floor"),)
    assert resolution.asked_rates == (("humanizing", 0.3),)
    assert resolution.forecast is not None
    low, other = resolution.forecast.categories
    assert (low["asked"], low["reachable"]) == ({"rate": 0.1}, False)
    assert low["refusal_rate"] == pytest.approx(21 / 40)  # margins of -0.5 and above, at bias 1
    assert (other["asked"], other["reachable"]) == ({"rate": 0.3}, True)
    assert other["refusal_rate"] == pytest.approx(0.3)


def test_total_bound_moves_what_has_no_floor_below_it() -> None:
    # Alone, both would share a bias between 19.5 and 31.5; safety's ceiling takes it out.
    bounds = Bounds((-INF, -INF), (5.0, INF))
    low, other = resolved(bounds, {"false_refusal_rate": 0.05}).controls.bias
    assert low == 5.0
    assert 19.5 < other < 31.5


def test_total_bound_that_a_floor_breaks_is_an_error_and_no_empty_promise() -> None:
    floor = Bounds((60.0, -INF), (INF, INF))  # refuses benign margins down to -60
    for bound in (0.05, 0):
        with pytest.raises(RequestError, match="benign prompts") as caught:
            resolved(floor, {"false_refusal_rate": bound})
    assert (caught.value.status, caught.value.param) == (422, "refusal.false_refusal_rate")


def test_rate_of_the_defaults_that_a_request_moves_indirectly_is_held() -> None:
    defaults = parse_options({"categories": {"safety": {"rate": 0.6}}})
    board = bounded(Bounds((3.5, -INF), (INF, INF)), defaults)
    assert board.unasked.clamped == ()
    for calibration in ("default", "tenant"):
        resolution = board.resolve(parse_options({"calibration": calibration}))
        assert resolution.controls.bias[0] >= 3.5


def test_clamps_of_the_defaults_alone_are_not_the_requests_doing() -> None:
    # The total bound of the defaults would move safety beyond its ceiling in every request.
    defaults = parse_options({"false_refusal_rate": 0.05})
    board = bounded(Bounds((-INF, -INF), (5.0, INF), refuses=True), defaults)
    assert board.unasked.clamped == (("safety", "ceiling"),)
    for value in ({}, {"categories": {"humanizing": 0.5}}):
        assert board.resolve(parse_options(value)).controls.bias[0] == 5.0
    with pytest.raises(NotAllowedError):
        bounded(board.bounds).resolve(parse_options({"false_refusal_rate": 0.05}))


def test_calibration_that_a_request_needs_and_is_missing_is_its_own_error() -> None:
    board = bounded(FLOORED, NOTHING, "elsewhere")
    with pytest.raises(RequestError, match="no calibration is named 'default'") as caught:
        board.resolve(parse_options(safety({"rate": 0.1})))
    assert caught.value.status == 422


# adapters


def test_floor_that_was_solved_on_a_calibration_holds_for_the_checkpoints_own_weights() -> None:
    solved = Bounds(FLOORED.floors, FLOORED.ceilings, calibrated=True)
    with pytest.raises(RequestError, match="adapter"):
        DecisionContext(resolved(solved, {})).adapt()
    context = DecisionContext(resolved(FLOORED, safety("never")))
    context.adapt()
    assert context.controls.bias[0] == 1.0
