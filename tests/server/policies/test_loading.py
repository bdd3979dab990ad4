import math
from pathlib import Path

import pytest

from models.controls import bias_of_sensitivity
from server.dials.protocol import parse_options
from server.policies.book import ActivePolicy
from server.policies.credentials import hash_key
from server.policies.source import FileError
from tests.server.policybooks import book, headers

INF = math.inf


def policy(folder: Path, text: str, *names: str) -> ActivePolicy:
    """Returns the policy `p`, whose fields are given, one a line."""
    fields = "".join(f"    {line}\n" for line in text.splitlines())
    whole = f"policies:\n  p:\n{fields or '    {}'}\nanonymous: p\n"
    return book(folder, whole, *names).policies["p"]


def problem(folder: Path, text: str, *names: str) -> str:
    """Returns the one thing that is wrong with the policy `p`, as `LINE: FIELD: what`."""
    with pytest.raises(FileError) as caught:
        policy(folder, text, *names)
    (only,) = caught.value.problems
    return only.removeprefix(f"{folder / 'policies.yaml'}:")


def test_bounds_are_written_as_sensitivity_word_or_bias(tmp_path: Path) -> None:
    bounds = policy(
        tmp_path,
        "floors: {safety: 0.8, humanizing: {bias: -1.5}}\nceilings: {safety: always}",
    ).board.bounds
    assert bounds.floors == (bias_of_sensitivity(0.8), -1.5)
    assert bounds.ceilings == (INF, INF)
    assert (bounds.has_floor, bounds.refuses, bounds.calibrated) == (True, False, False)


def test_floor_may_be_a_rate_of_the_categorys_own_dial(tmp_path: Path) -> None:
    text = "floors: {safety: {rate: 0.25}, humanizing: {rate: 0.5}}"
    bounds = policy(tmp_path, text, "default").board.bounds
    # The ten largest of -19.5 ... 19.5 are 10.5 and more.
    assert -10.5 <= bounds.floors[0] < -9.5
    assert -0.5 <= bounds.floors[1] < 0.5
    assert bounds.calibrated


@pytest.mark.parametrize(
    ("rate", "floor", "ceiling"), [(0.25, 10, 10), (0.26, 11, 10), (0.01, 1, 0), (0.999, 40, 39)]
)
def test_rates_between_two_prompts_are_rounded_to_the_operators_side(
    tmp_path: Path, rate: float, floor: int, ceiling: int
) -> None:
    margins = [-19.5 + i for i in range(40)]
    for side, prompts in (("floor", floor), ("ceiling", ceiling)):
        text = f"{side}s: {{safety: {{rate: {rate}}}}}"
        bounds = policy(tmp_path, text, "default").board.bounds
        bias = (bounds.floors if side == "floor" else bounds.ceilings)[0]
        assert sum(margin + bias >= 0 for margin in margins) == prompts


def test_floor_may_be_what_a_false_refusal_rate_allows(tmp_path: Path) -> None:
    text = "floors: {safety: {false_refusal_rate: 0.05}}"
    assert 19.5 < policy(tmp_path, text, "default").board.bounds.floors[0] < 31.5


def test_bounds_are_solved_on_the_policys_own_calibration(tmp_path: Path) -> None:
    text = "defaults: {calibration: tenant}\nfloors: {safety: {rate: 0.25}}"
    assert policy(tmp_path, text, "tenant").board.bounds.calibrated
    assert problem(tmp_path, text, "default").startswith("4: policies.p.floors.safety: no cal")


def test_rate_floor_holds_whatever_the_other_dials_are(tmp_path: Path) -> None:
    active = policy(tmp_path, "floors: {safety: {rate: 0.25}}", "default")
    for other in ("never", "always", 0.5, {"rate": 0.9}):
        for own in ("never", {"rate": 0.0}, {"rate": 0.1}):
            asked = parse_options({"categories": {"safety": own, "humanizing": other}})
            resolution = active.board.resolve(asked, explain=True)
            assert resolution.forecast is not None
            assert resolution.forecast.categories[0]["refusal_rate"] >= 0.25


def test_default_dials_rest_at_the_floor(tmp_path: Path) -> None:
    board = policy(tmp_path, "floors: {safety: 0.8}\nceilings: {humanizing: 0.3}").board
    assert board.unasked.controls.bias == (bias_of_sensitivity(0.8), bias_of_sensitivity(0.3))
    assert board.unasked.clamped == ()


@pytest.mark.parametrize("field", ["raw_prompts", "prefill", "report", "grammars"])
@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ("{}", True),
        ("ceilings: {safety: 0.8}", True),
        ("floors: {safety: never}", True),
        ("floors: {safety: 0.1}", False),
        ("floors: {safety: 0.1}\nFIELD: true", True),
        ("FIELD: false", False),
    ],
)
def test_what_weakens_a_floor_is_off_by_default_where_there_is_one(
    tmp_path: Path, field: str, fields: str, allowed: bool
) -> None:
    active = policy(tmp_path, fields.replace("FIELD", field))
    assert getattr(active, field) is allowed


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        ("generated", (None, None)),
        ("template", ("I can't help with that.", "I can't help with that.")),
        ("We do not do that.", ("We do not do that.",) * 2),
        ("{safety: template}", ("I can't help with that.", None)),
        ('{safety: "No.", humanizing: generated}', ("No.", None)),
    ],
)
def test_refusal_text_is_generated_the_checkpoints_or_the_policys(
    tmp_path: Path, written: str, texts: tuple[str | None, ...]
) -> None:
    assert policy(tmp_path, f"refusal_text: {written}").refusal_texts == texts


def test_other_fields_are_carried(tmp_path: Path) -> None:
    active = policy(
        tmp_path, "enforce: false\ncontrol_text: refuse\nreport: false\noutside: refuse"
    )
    assert (active.name, active.enforce, active.control_text, active.report) == (
        "p",
        False,
        "refuse",
        False,
    )
    assert active.board.bounds.refuses
    assert not active.board.bounds.has_floor


@pytest.mark.parametrize(
    ("fields", "names", "told"),
    [
        ("floors: {weather: 0.8}", (), "3: policies.p.floors.weather: this checkpoint has no"),
        ("ceilings: {weather: 0.8}", (), "3: policies.p.ceilings.weather: this checkpoint has"),
        ("refusal_text: {weather: x}", (), "3: policies.p.refusal_text.weather: this checkpoint"),
        (
            "enforce: true\ndefaults:\n  categories:\n    weather: 0.8",
            (),
            "6: policies.p.defaults.categories.weather: this checkpoint has no such category",
        ),
        (
            "floors: {safety: {rate: 0.3}}",
            (),
            "3: policies.p.floors.safety: this checkpoint has no cal",
        ),
        (
            "ceilings:\n  humanizing: 1\n  safety: {rate: 0.3}",
            ("tenant",),
            "5: policies.p.ceilings.safety: no calibration is named 'default'",
        ),
        (
            "floors: {safety: {false_refusal_rate: 0.001}}",
            ("default",),
            "3: policies.p.floors.safety: a false refusal rate of 0.001 needs at least",
        ),
        (
            "floors:\n  safety: {rate: 0.9}\nceilings:\n  safety: {rate: 0.1}",
            ("default",),
            "4: policies.p.floors.safety: a bias of",
        ),
        (
            "floors: {safety: {rate: 0.9}}\nceilings: {safety: 0.5}",
            ("default",),
            "3: policies.p.floors.safety: a bias of",
        ),
        (
            "floors: {safety: 0.8}\ndefaults: {report: true}",
            (),
            "4: policies.p.defaults.report: reports are off in this policy; with a floor, they",
        ),
        (
            "report: false\ndefaults: {report: true}",
            (),
            "4: policies.p.defaults.report: reports are off in this policy",
        ),
        (
            "floors: {safety: 0.8}\ndefaults: {categories: {safety: 0.7}}",
            (),
            "4: policies.p.defaults.categories.safety: lies beyond the policy's floor",
        ),
        (
            "ceilings: {safety: 0.8}\ndefaults: {categories: {safety: {rate: 1}}}",
            ("default",),
            "4: policies.p.defaults.categories.safety: lies beyond the policy's ceiling",
        ),
        (
            "defaults: {categories: {safety: {rate: 0.3}}}",
            (),
            "3: policies.p.defaults.categories.safety: this checkpoint has no calibration",
        ),
        (
            "defaults: {calibration: elsewhere}",
            ("default",),
            "3: policies.p.defaults.calibration: no calibration is named",
        ),
    ],
)
def test_what_the_checkpoint_cannot_do_is_told_with_its_line(
    tmp_path: Path, fields: str, names: tuple[str, ...], told: str
) -> None:
    assert problem(tmp_path, fields, *names).startswith(told)


def test_problems_of_all_policies_are_told_at_once(tmp_path: Path) -> None:
    text = "policies:\n  a:\n    floors: {x: 1}\n  b:\n    floors: {y: 1}\nanonymous: a\n"
    with pytest.raises(FileError) as caught:
        book(tmp_path, text)
    assert len(caught.value.problems) == 2


def test_callers_know_how_much_they_may_have_under_way(tmp_path: Path) -> None:
    text = f"""\
policies: {{p: {{}}}}
tenants:
  a: {{policies: [p], keys: ["{hash_key("a")}"], max_running: 3}}
  b: {{policies: [p], keys: ["{hash_key("b")}"]}}
anonymous: p
anonymous_max_running: 5
"""
    known = book(tmp_path, text)
    most = [known.caller(headers(x_api_key=key)).max_running for key in ("a", "b", "c")]
    assert most == [3, None, 5]
