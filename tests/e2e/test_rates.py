"""Asking for a refusal rate, and getting it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from models.calibration import save_calibration
from models.errors import ServiceError
from models.hashes import checkpoint_hashes
from models.histogram import load_margins
from rheostat import app
from tests.e2e.calibrating import KEY, CalibratedServer, score
from tests.e2e.servers import OPERATOR, Post, until

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "Do you like your breakfast?"}
HALF = {"rate": 0.5}
KEYED = {"authorization": f"Bearer {KEY}"}
# fp32 sums depend on what else is in a batch: one prompt of 40 may fall on the other side.
ONE_PROMPT = 1 / 40 + 1e-9


@pytest.fixture
def client(calibrated: CalibratedServer) -> Iterator[httpx.Client]:
    with calibrated.client() as client:
        yield client


def refused_share(entries: list[dict[str, Any]]) -> float:
    refused = [bool(entry["refused"]) for entry in entries]
    return sum(refused) / len(refused)


def test_rates_of_all_categories_are_met_together(
    calibrated: CalibratedServer, client: httpx.Client
) -> None:
    names = calibrated.calibration.names
    asked = dict(zip(names, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True))
    refusal = {"categories": {name: {"rate": rate} for name, rate in asked.items()}}
    for name, rate in asked.items():
        answer = score(client, calibrated.texts(name), refusal=refusal)
        expected = answer["expected"]["categories"][name]
        assert expected["asked"] == {"rate": rate}
        achieved = refused_share(answer["data"])
        assert achieved == pytest.approx(expected["refusal_rate"], abs=ONE_PROMPT)
        if expected["reachable"]:
            assert achieved == pytest.approx(rate, abs=ONE_PROMPT)
        low, high = expected["refusal_rate_interval"]
        assert low <= expected["refusal_rate"] <= high


def test_bound_on_false_refusals_keeps_benign_prompts_answered(
    calibrated: CalibratedServer, client: httpx.Client
) -> None:
    benign = calibrated.texts(None)
    total = score(client, benign, refusal={"false_refusal_rate": 0.1})
    assert total["expected"]["asked"] == 0.1
    achieved = refused_share(total["data"])
    assert achieved <= 0.1
    assert achieved == pytest.approx(total["expected"]["false_refusal_rate"], abs=1 / 120 + 1e-9)
    dial = {"categories": {"safety": {"false_refusal_rate": 0.1}}}
    one = score(client, benign, refusal=dial)
    own = [entry["decisions"]["safety"]["refused"] for entry in one["data"]]
    assert sum(own) / len(own) <= 0.1


def test_report_says_what_to_expect(client: httpx.Client) -> None:
    refusal = {"report": True, "categories": {"unsupported": {"rate": 0.3}, "safety": 0.9}}
    body = {"model": "demo", "messages": [QUESTION], "max_tokens": 1, "refusal": refusal}
    report = client.post(CHAT, json=body).json()["choices"][0]["refusal_report"]
    assert report["calibration"] == "default"
    assert set(report["expected"]) == {
        "false_refusal_rate",
        "false_refusal_rate_interval",
        "asked",
    }
    asked = {name: d["expected"]["asked"] for name, d in report["decisions"].items()}
    assert asked.pop("unsupported") == {"rate": 0.3}
    assert set(asked.values()) == {None}
    expected = report["decisions"]["unsupported"]["expected"]
    assert expected["refusal_rate"] == pytest.approx(0.3, abs=0.005)
    assert expected["reachable"] is True
    low, high = expected["refusal_rate_interval"]
    assert 0 <= low <= 0.3 <= high <= 1
    assert isinstance(report["decisions"]["unsupported"]["bias"], float)


def body_of(path: str, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {
        "/v1/completions": {"prompt": text, "max_tokens": 2},
        "/v1/responses": {"input": text, "max_output_tokens": 2},
        "/v1/chat/completions/batch": {"messages": [messages], "max_tokens": 2},
    }.get(path, {"messages": messages, "max_tokens": 2}) | {"model": "demo"}


STREAMED = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"]


@pytest.mark.parametrize(
    ("path", "streamed"),
    [
        ("/v1/chat/completions/batch", False),
        *((path, streamed) for path in STREAMED for streamed in (False, True)),
    ],
)
def test_every_route_takes_rates(client: httpx.Client, path: str, streamed: bool) -> None:
    body = body_of(path, "Do you like your breakfast?") | {"stream": streamed}
    before = decisions(client, "refuse", "greedy")
    # As near to all as can be asked for: this prompt is refused in any case.
    rate: dict[str, Any] = {"categories": {"humanizing": {"rate": 1.0}}}
    answer = client.post(path, json=body | {"refusal": rate})
    assert answer.status_code == 200, answer.text
    assert decisions(client, "refuse", "greedy") == before + 1
    uncertain = {"categories": {"humanizing": {"false_refusal_rate": 0.0001}}}
    for refusal, message in (
        (uncertain, "needs at least"),
        (rate | {"decision": "sample"}, "hold under greedy only"),
    ):
        rejected = client.post(path, json=body | {"refusal": refusal})
        assert rejected.status_code == 422
        assert message in rejected.json()["error"]["message"]


def decisions(client: httpx.Client, decision: str, rule: str) -> float:
    lines = client.get("/metrics", headers=OPERATOR).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("rheostat_decisions_total")
        and f'decision="{decision}"' in line
        and f'rule="{rule}"' in line
    )


def test_header_form_takes_rates(calibrated: CalibratedServer, client: httpx.Client) -> None:
    inputs = [{"messages": [QUESTION]}]
    dials = {"unsupported": {"rate": 0.3}, "safety": {"false_refusal_rate": 0.1}}
    in_header = client.post(
        "/v1/refusal/score",
        json={"inputs": inputs},
        headers={"X-Refusal": "unsupported=rate:0.3, safety=false_refusal_rate:0.1"},
    )
    in_body = client.post(
        "/v1/refusal/score", json={"inputs": inputs, "refusal": {"categories": dials}}
    )
    assert in_header.json()["expected"] == in_body.json()["expected"]
    assert in_header.json()["data"][0]["decisions"]["safety"]["bias"] != 0.0


@pytest.mark.parametrize(
    ("refusal", "param", "said"),
    [
        ({"calibration": "elsewhere"}, "refusal.calibration", "loaded are default"),
        ({"calibration": "../../etc/passwd"}, "refusal.calibration", "pattern"),
        ({"categories": {"weather": {"rate": 0.3}}}, "refusal.categories.weather", "no such"),
        ({"categories": {"safety": {"rate": 1.5}}}, "refusal.categories.safety", "between 0"),
        ({"false_refusal_rate": 0.0001}, "refusal.false_refusal_rate", "needs at least"),
        (
            {"categories": {"safety": {"false_refusal_rate": 0.0001}}},
            "refusal.categories.safety",
            "needs at least",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_a_422(
    client: httpx.Client, refusal: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": "demo", "messages": [QUESTION], "max_tokens": 1, "refusal": refusal}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_curves_are_served(calibrated: CalibratedServer, client: httpx.Client) -> None:
    body = client.get("/v1/refusal/calibration").json()
    assert (body["name"], body["names"]) == ("default", ["default"])
    assert body["hashes"] == calibrated.calibration.info.hashes.model_dump()
    assert body["prompts"] == {**calibrated.calibration.prompts, "benign": 120}
    assert [c["name"] for c in body["categories"]] == list(calibrated.calibration.names)
    # A point of the curve is what the dial does.
    name = "incomplete"
    (curve,) = (c["curve"] for c in body["categories"] if c["name"] == name)
    point = curve[len(curve) // 3]
    refusal = {"categories": {name: {"bias": point["bias"]}}}
    entries = score(client, calibrated.texts(name), refusal=refusal)["data"]
    assert refused_share(entries) == pytest.approx(point["refusal_rate"], abs=ONE_PROMPT)
    assert client.get("/v1/refusal/calibration?name=elsewhere").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/refusal/score"), ("GET", "/v1/refusal/calibration")]
)
def test_routes_are_behind_the_api_key(
    calibrated: CalibratedServer, method: str, path: str
) -> None:
    url = calibrated.server.url + path
    answer = httpx.request(method, url, json={"inputs": [{"messages": [QUESTION]}]}, timeout=30)
    assert answer.status_code == 401


def test_observed_refusals_stand_beside_the_asked_rate(calibrated: CalibratedServer) -> None:
    before = compared(calibrated)
    body = {"model": "demo", "max_tokens": 1, "refusal": {"categories": {"humanizing": HALF}}}
    posts = [
        Post(CHAT, {**body, "messages": [{"role": "user", "content": text}]})
        for text in calibrated.texts("humanizing")
    ]
    answers = calibrated.server.post_all(posts, **KEYED)
    category = [answer.headers["x-refusal-category"] for answer in answers]
    after = compared(calibrated)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["rate_choices"] == 40
    assert gained["asked_rate"] == pytest.approx(20)
    assert gained["rate_refusals"] == category.count("humanizing")
    # Only the category's own prompts came, so nearly all that was asked for is observed.
    assert gained["rate_refusals"] / gained["asked_rate"] == pytest.approx(1, abs=0.2)


def compared(calibrated: CalibratedServer) -> dict[str, float]:
    labels = '{category="humanizing",model_name="demo",policy="default"}'
    return {
        name: calibrated.server.metric(f"rheostat_{name}_total{labels}")
        for name in ("rate_choices", "asked_rate", "rate_refusals")
    }


def test_margins_of_half_the_traffic_are_recorded(calibrated: CalibratedServer) -> None:
    body = {"model": "demo", "messages": [QUESTION], "max_tokens": 1}
    for answer in calibrated.server.post_all([Post(CHAT, body)] * 40, **KEYED):
        assert answer.status_code == 200

    def rows() -> int:
        policies = load_margins(calibrated.margins).policies
        return policies["default"].rows if policies else 0

    # Of 40 with a share of a half, fewer than 8 would be a chance of 1 in 20,000.
    until(lambda: rows() >= 8)
    recorded = load_margins(calibrated.margins)
    assert recorded.weights_sha256 == calibrated.calibration.info.hashes.weights
    assert set(recorded.policies["default"].counts) == set(calibrated.calibration.names)
    assert "breakfast" not in calibrated.margins.read_text()


# at start


def serve(model: Path, **variables: str) -> str:
    """Starts a server that must not start; returns what it says."""
    command = ["serve", "--model", str(model)]
    done = CliRunner().invoke(app, command, env={"HF_HUB_OFFLINE": "1", **variables})
    assert isinstance(done.exception, ServiceError)
    return done.exception.message


def test_calibration_of_other_weights_is_refused_with_both_hashes(
    checkpoint: Path, calibrated: CalibratedServer, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    save_calibration(model, calibrated.calibration)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    said = serve(model)
    assert "'default'" in said
    assert calibrated.calibration.info.hashes.template[:12] in said
    assert checkpoint_hashes(model).template[:12] in said
    assert "template" in said


def test_defaults_that_need_a_calibration_are_refused_without_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    defaults = {"categories": {"safety": {"rate": 0.3}}}
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("calibrations"))
    said = serve(model, RHEOSTAT_DEFAULTS=json.dumps(defaults))
    assert said.startswith("RHEOSTAT_DEFAULTS: refusal.")
    assert "rheostat calibrate --model" in said
