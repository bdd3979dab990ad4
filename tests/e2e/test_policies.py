"""One server with a policy file: who may call, what no dial gets around, and reading it again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from models.calibration import (
    BENIGN,
    CALIBRATIONS,
    Calibration,
    CalibrationInfo,
    save_calibration,
)
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from server.credentials import generate_key, hash_key
from tests.e2e.servers import Server, rheostat_server

CHAT = "/v1/chat/completions"
SCORE = "/v1/refusal/score"
POLICIES = "/v1/refusal/policies"
ACME, SHOP, SECRET = generate_key(), generate_key(), generate_key()
QUESTION = {"role": "user", "content": "What is the capital of France, please?"}
CHAT_BODY = {"model": "demo", "messages": [QUESTION], "max_tokens": 4}
# A floor of 60 nats refuses every prompt, so one answer would be one too many.
FILE = f"""\
policies:
  desk:
    floors: {{safety: {{bias: 60}}}}
    raw_prompts: true
  lab:
    defaults: {{categories: {{safety: never}}}}
  strict:
    floors: {{safety: {{bias: 60}}}}
    ceilings: {{humanizing: 0.5}}
    outside: refuse
tenants:
  acme:
    policies: [desk, lab]
    keys: ["{hash_key(ACME)}"]
  shop:
    policies: [strict]
    keys: ["{hash_key(SHOP)}"]
    header: shop
gateway:
  tenant_header: X-Tenant
  secret_header: X-Gateway-Secret
  secrets: ["{hash_key(SECRET)}"]
anonymous: null
"""
NO_FLOOR = FILE.replace("    floors: {safety: {bias: 60}}\n    raw", "    raw")
ALL_NEVER = dict.fromkeys(
    ("safety", "humanizing", "incomplete", "indeterminate", "unsupported"), "never"
)


class Policied(NamedTuple):
    """A running server, its policy file and its trace."""

    server: Server
    file: Path
    trace: Path

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        return httpx.Client(base_url=self.server.url, headers=sent, timeout=60)


def made_up_calibration(checkpoint: Path, name: str) -> Calibration:
    """Returns a calibration of the checkpoint with margins that were never measured."""
    names = load_manifest(checkpoint).names
    category = np.repeat([*range(len(names)), BENIGN], 40)
    margins = np.random.default_rng(0).normal(0, 4, (len(category), len(names)))
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.logaddexp.reduce(np.c_[margins, np.zeros(len(margins))], axis=1).astype(
            np.float32
        ),
        category=category,
        info=CalibrationInfo(
            name=name,
            created=datetime.now(UTC),
            categories=tuple(names),
            hashes=checkpoint_hashes(checkpoint),
            rheostat="0",
        ),
    )


@pytest.fixture(scope="module")
def policied(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policied]:
    folder = tmp_path_factory.mktemp("policies")
    model = folder / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(CALIBRATIONS))
    for name in ("default", "tenant"):
        save_calibration(model, made_up_calibration(model, name))
    file, trace = folder / "policies.yaml", folder / "trace.jsonl"
    file.write_text(FILE)
    variables = {"RHEOSTAT_POLICY_FILE": str(file), "RHEOSTAT_TRACE_FILE": str(trace)}
    with rheostat_server(model, folder / "log", variables=variables) as server:
        yield Policied(server, file, trace)


@pytest.fixture
def acme(policied: Policied) -> Iterator[httpx.Client]:
    with policied.client(ACME) as client:
        yield client


@pytest.fixture
def shop(policied: Policied) -> Iterator[httpx.Client]:
    with policied.client(SHOP) as client:
        yield client


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def decision(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-refusal-decision"]


# who may call


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/invocations"),
        ("POST", SCORE),
        ("GET", POLICIES),
        ("GET", "/v1/models"),
        ("GET", "/v1/refusal/calibration"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer unused"},
        {"authorization": f"Bearer {hash_key(ACME)}"},
        {"x-tenant": "shop"},
        {"x-tenant": "shop", "x-gateway-secret": "guessed"},
        {"x-tenant": "acme", "x-gateway-secret": SECRET},
    ],
    ids=str,
)
def test_nobody_but_the_tenants_may_call(
    policied: Policied, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = httpx.request(
        method, policied.server.url + path, json=CHAT_BODY, headers=headers, timeout=30
    )
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SHOP}"},
        {"x-api-key": SHOP},
        {"x-tenant": "shop", "x-gateway-secret": SECRET},
    ],
    ids=["bearer", "x-api-key", "gateway"],
)
def test_tenant_sees_its_own_policies_and_nothing_of_others(
    policied: Policied, headers: dict[str, str]
) -> None:
    answer = httpx.get(policied.server.url + POLICIES, headers=headers, timeout=30)
    assert answer.status_code == 200
    body = answer.json()
    assert body["tenant"] == "shop"
    (strict,) = body["data"]
    assert (strict["name"], strict["outside"]) == ("strict", "refuse")
    assert strict["categories"]["safety"]["floor"]["bias"] == 60
    assert strict["categories"]["humanizing"]["ceiling"] == {"bias": 0.0, "sensitivity": 0.5}
    assert not {"acme", "desk", "lab"} & set(answer.text.replace('"', " ").split())


# no dial gets around a floor

DIALS: list[dict[str, Any]] = [
    {},
    {"categories": ALL_NEVER},
    {"categories": {"safety": 0}},
    {"categories": {"safety": 0.5}},
    {"categories": {"safety": {"bias": -1e308}}},
    {"categories": {"safety": {"rate": 0}}},
    {"categories": {**ALL_NEVER, "safety": {"rate": 0.1}}, "calibration": "tenant"},
    {"categories": {"safety": {"false_refusal_rate": 0}}},
    {"categories": ALL_NEVER, "decision": "sample"},
    {"categories": ALL_NEVER, "decision": "paper"},
    {"decision": "paper"},
    {"categories": {"safety": {"rate": 0.1}}, "decision": "sample"},
    {"policy": "desk", "categories": ALL_NEVER, "report": True},
]
BEYOND = [dials for dials in DIALS if dials and "policy" not in dials]
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: CHAT_BODY,
    "/v1/completions": {"model": "demo", "prompt": "Hello there", "max_tokens": 4},
    "/v1/responses": {"model": "demo", "input": "Hello there", "max_output_tokens": 4},
    "/v1/messages": CHAT_BODY,
    "/invocations": CHAT_BODY,
}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("dials", DIALS, ids=json.dumps)
def test_no_dial_of_a_request_gets_below_the_floor(
    acme: httpx.Client, path: str, dials: dict[str, Any]
) -> None:
    answer = acme.post(path, json={**ROUTES[path], "refusal": dials})
    assert decision(answer) == "refuse"


@pytest.mark.parametrize("temperature", [0, 1, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_temperature_and_no_draw_gets_below_the_floor(
    acme: httpx.Client, temperature: float, seed: int
) -> None:
    asked = {"decision": "sample", "categories": ALL_NEVER}
    body = {**CHAT_BODY, "temperature": temperature, "seed": seed, "n": 2, "refusal": asked}
    if temperature == 0:
        body["n"] = 1
    assert set(decision(acme.post(CHAT, json=body)).split(", ")) == {"refuse"}


@pytest.mark.parametrize(
    "dials", ["safety=never", "safety=bias:-99", "safety=rate:0, humanizing=never", "safety=0"]
)
def test_header_form_does_not_get_below_the_floor(acme: httpx.Client, dials: str) -> None:
    for more in ({}, {"x-refusal-policy": "desk"}):
        answer = acme.post(CHAT, json=CHAT_BODY, headers={"x-refusal": dials, **more})
        assert decision(answer) == "refuse"


def test_score_shows_the_floor_and_what_was_clamped(acme: httpx.Client) -> None:
    asked = {"categories": {"safety": "never"}, "decision": "paper"}
    body = {"inputs": [{"messages": [QUESTION]}], "refusal": asked}
    answer = acme.post(SCORE, json=body)
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["data"]
    assert entry["refused"] is True
    assert entry["decisions"]["safety"]["bias"] == 60
    assert entry["decisions"]["safety"]["clamped"] == "floor"
    assert "clamped" not in entry["decisions"]["humanizing"]
    assert entry["replaced_decision"] == "paper"


@pytest.mark.parametrize(
    "dials", [d for d in DIALS if d.get("policy") is None and d], ids=json.dumps
)
def test_policy_that_does_not_clamp_answers_403(shop: httpx.Client, dials: dict[str, Any]) -> None:
    for path in (CHAT, "/v1/messages", SCORE):
        body = {"inputs": [{"messages": [QUESTION]}]} if path == SCORE else CHAT_BODY
        answer = shop.post(path, json={**body, "refusal": dials})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "not_allowed"
    assert decision(shop.post(CHAT, json=CHAT_BODY)) == "refuse"


# which policy


def test_tenant_chooses_among_its_own_policies(acme: httpx.Client) -> None:
    lab = {**ALL_NEVER}
    in_body = {**CHAT_BODY, "refusal": {"policy": "lab", "categories": lab}}
    assert decision(acme.post(CHAT, json=in_body)) == "respond"
    by_header = acme.post(
        CHAT,
        json={**CHAT_BODY, "refusal": {"categories": lab}},
        headers={"x-refusal-policy": "lab"},
    )
    assert decision(by_header) == "respond"


@pytest.mark.parametrize("path", [*ROUTES, SCORE])
def test_policies_of_others_are_403_whether_they_exist_or_not(
    acme: httpx.Client, path: str
) -> None:
    body = {"inputs": [{"messages": [QUESTION]}]} if path == SCORE else ROUTES[path]
    messages = []
    for name in ("strict", "absent"):
        for sent in ({"json": {**body, "refusal": {"policy": name}}}, {"json": body}):
            headers = {} if "refusal" in sent["json"] else {"x-refusal-policy": name}
            answer = acme.post(path, json=sent["json"], headers=headers)
            assert answer.status_code == 403
            messages.append(answer.json()["error"]["message"].replace(name, "NAME"))
    assert len(set(messages)) == 1


# reading the file again


def test_changed_file_is_in_force_without_a_restart(policied: Policied, acme: httpx.Client) -> None:
    asked = {**CHAT_BODY, "refusal": {"categories": ALL_NEVER}}
    assert decision(acme.post(CHAT, json=asked)) == "refuse"
    try:
        policied.file.write_text(NO_FLOOR)
        until(lambda: decision(acme.post(CHAT, json=asked)) == "respond")
        reloads = metric(policied, 'rheostat_policy_reloads_total{result="bad"}')
        policied.file.write_text(FILE.replace("bias: 60", "bias: much"))
        until(
            lambda: metric(policied, 'rheostat_policy_reloads_total{result="bad"}') == reloads + 1
        )
        assert metric(policied, "rheostat_policy_file_valid") == 0
        assert decision(acme.post(CHAT, json=asked)) == "respond"
        assert "policies.yaml:3: policies.desk.floors.safety" in policied.server.log.read_text()
    finally:
        policied.file.write_text(FILE)
        os.kill(policied.server.process.pid, signal.SIGHUP)
        until(lambda: decision(acme.post(CHAT, json=asked)) == "refuse")
    assert metric(policied, "rheostat_policy_file_valid") == 1


def test_hang_up_reads_the_file_again(policied: Policied) -> None:
    name = 'rheostat_policy_reloads_total{result="ok"}'
    before = metric(policied, name)
    os.kill(policied.server.process.pid, signal.SIGHUP)
    until(lambda: metric(policied, name) == before + 1)


def metric(policied: Policied, name: str) -> float:
    lines = dict(
        line.rsplit(" ", 1)
        for line in policied.server.metrics().splitlines()
        if not line.startswith("#")
    )
    return float(lines.get(name, 0))


# what is told


def test_decisions_are_counted_by_policy(policied: Policied, acme: httpx.Client) -> None:
    asked = {**CHAT_BODY, "refusal": {"categories": {"safety": "never"}}}
    clamped = 'rheostat_clamped_dials_total{bound="floor",category="safety",policy="desk"}'
    before = metric(policied, clamped)
    decision(acme.post(CHAT, json=asked))
    assert metric(policied, clamped) == before + 1
    decided = (
        'rheostat_decisions_total{category="safety",decision="refuse",policy="desk",rule="greedy"}'
    )
    assert metric(policied, decided) > 0


def test_trace_has_a_line_a_choice_and_no_text(policied: Policied, acme: httpx.Client) -> None:
    asked = {"categories": {"safety": 0.25}, "decision": "sample"}
    body = {**CHAT_BODY, "n": 2, "temperature": 1, "refusal": asked}
    answer = acme.post(CHAT, json=body)
    decision(answer)
    request_id = answer.json()["id"]

    def lines() -> list[dict[str, Any]]:
        written = [json.loads(line) for line in policied.trace.read_text().splitlines()]
        return [line for line in written if line["request_id"] == request_id]

    until(lambda: len(lines()) == 2)
    for choice, line in enumerate(lines()):
        assert line["choice"] == choice
        assert (line["tenant"], line["policy"], line["route"]) == ("acme", "desk", CHAT)
        assert line["asked"]["decision"] == "sample"
        assert line["asked"]["categories"]["safety"]["bias"] == pytest.approx(-1.0986, abs=1e-4)
        assert line["effective"]["decision"] == "greedy"
        assert line["effective"]["bias"]["safety"] == 60
        assert line["clamped"] == {"safety": "floor"}
        assert (line["decision"], line["category"]) == ("refuse", "safety")
    assert "France" not in policied.trace.read_text()
    assert ACME not in policied.trace.read_text()


# at start


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (["--api-key", "k"], {}, "--api-key (or VLLM_API_KEY): RHEOSTAT_POLICY_FILE holds"),
        ([], {"RHEOSTAT_DEFAULTS": "{}"}, "RHEOSTAT_DEFAULTS: the policies of RHEOSTAT_POLICY"),
        ([], {"RHEOSTAT_POLICY_FILE": "absent.yaml"}, "absent.yaml: it cannot be read"),
        ([], {"RHEOSTAT_TRACE_FILE": "no/where"}, "RHEOSTAT_TRACE_FILE: no/where cannot be"),
    ],
)
def test_contradictory_settings_are_one_line_at_start(
    policied: Policied, checkpoint: Path, flags: list[str], variables: dict[str, str], said: str
) -> None:
    command = [sys.executable, "-m", "rheostat", "serve", "--model", str(checkpoint), *flags]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "RHEOSTAT_POLICY_FILE": str(policied.file),
        **variables,
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"rheostat: {said}")
    assert "Traceback" not in done.stderr
