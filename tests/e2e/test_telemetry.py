"""What Prometheus, Grafana, an OpenTelemetry collector and a log reader see of the real server."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from models.calibration import CALIBRATIONS, save_calibration
from models.manifest import Manifest
from tests.docker.prometheus import Prometheus, expressions, prometheus
from tests.docker.test_prometheus import dashboard, targets
from tests.e2e.policied import made_up_calibration
from tests.e2e.servers import OPERATOR, Server, free_port, http_client, rheostat_server, until
from tests.server.collector import Collector, Exported, collecting

CHAT, SCORE = "/v1/chat/completions", "/v1/refusal/score"
SECRET = "Is the zanzibar ledger a secret?"
MESSAGES = [{"role": "user", "content": SECRET}]
PARENT = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
POLICIES = """\
policies:
  desk:
    floors: {safety: 0.6}
    raw_prompts: true
    report: true
    defaults: {categories: {humanizing: {rate: 0.5}}}
  trial:
    enforce: false
    defaults: {categories: {humanizing: always}}
tenants: {}
anonymous: desk
"""
AS_PROMETHEUS_2 = {**OPERATOR, "accept": "application/openmetrics-text;version=1.0.0"}
VARIABLES = {"$job": "rheostat", "$model_name": "demo", "$__rate_interval": "1m"}


class Observed(NamedTuple):
    """A server and what looks at it."""

    server: Server
    scraped: httpx.Client
    prometheus: Prometheus
    collector: Collector


@pytest.fixture(scope="module")
def observed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """A server with everything on that can be seen, and traffic of every kind."""
    folder = tmp_path_factory.mktemp("observed")
    model = folder / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(CALIBRATIONS))
    save_calibration(model, made_up_calibration(model, "default"))
    (folder / "policies.yaml").write_text(POLICIES)
    (folder / "prometheus").mkdir()
    port = free_port()
    target = f"127.0.0.1:{port}"
    with ExitStack() as ends:
        collector = ends.enter_context(collecting())
        flags = ["--metrics-port", str(port), "--otlp-traces-endpoint", collector.endpoint]
        flags += ["--logging-config.formatter", "json"]
        variables = {
            "RHEOSTAT_POLICY_FILE": str(folder / "policies.yaml"),
            "RHEOSTAT_TRACE_FILE": str(folder / "trace.jsonl"),
            "RHEOSTAT_RECORD_FILE": str(folder / "margins.json"),
            "RHEOSTAT_RECORD_SHARE": "1",
            "RHEOSTAT_CHECK_EVERY_S": "1",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        server = rheostat_server(model, folder / "log", *flags, variables=variables)
        ends.callback(server.end)
        looking = ends.enter_context(prometheus(folder / "prometheus", target))
        server.wait_until_ready()
        send_traffic(server.http)
        scraped = ends.enter_context(http_client(f"http://{target}"))
        yield Observed(server, scraped, looking, collector)


def send_traffic(http: httpx.Client) -> None:
    """Sends requests of every kind: refused, answered, clamped, shadowed, scored, rejected."""
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 4}
    refusals: list[dict[str, Any]] = [
        {},
        {"categories": {"humanizing": {"rate": 0.99}}},
        {"categories": {"humanizing": "always"}},
        {"categories": {"safety": "never"}},
        {"policy": "trial"},
        {"report": True},
        {"no such field": SECRET},
    ]
    for refusal in refusals * 2:
        answer = http.post(CHAT, json={**body, "refusal": refusal})
        assert answer.status_code in (200, 403, 422), answer.text
    http.post(CHAT, json={**body, "stream": True})
    http.post("/v1/completions", json={"model": "demo", "prompt": SECRET, "max_tokens": 2})
    http.post("/v1/messages", json=body)
    http.post("/v1/responses", json={"model": "demo", "input": SECRET, "max_output_tokens": 4})
    http.post(CHAT, json={**body, "model": "other"})
    http.post(CHAT, content=SECRET)
    scored = http.post(SCORE, json={"inputs": [{"messages": MESSAGES}] * 3})
    assert scored.status_code == 200, scored.text


# the second listener


def test_metrics_and_probes_need_no_key_on_their_own_port(observed: Observed) -> None:
    http = observed.scraped
    series = http.get("/metrics").text
    assert 'rheostat_build_info{model_name="demo",version=' in series
    assert 'vllm:num_requests_waiting{engine="0",model_name="demo"}' in series
    assert http.get("/readyz").json() == {"status": "ready"}
    assert http.get("/healthz").status_code == 200
    for path in ("/v1/models", "/docs", "/", "/v1/refusal/policies"):
        assert http.get(path).status_code == 404
    assert http.post(CHAT, json={}).status_code == 404
    # On the main port metrics stay the operator's.
    main = observed.server
    assert main.http.get("/metrics").status_code == 401
    assert "\nvllm:num_requests_waiting{" in main.http.get("/metrics", headers=AS_PROMETHEUS_2).text


def test_each_series_of_ours_names_the_model(observed: Observed) -> None:
    lines = observed.scraped.get("/metrics").text.splitlines()
    ours = [line for line in lines if line.startswith("rheostat_")]
    assert ours
    assert all('model_name="demo"' in line for line in ours)
    assert "zanzibar" not in "".join(lines)


# Prometheus and Grafana


def shown() -> dict[str, str]:
    """Returns all expressions of rules and dashboard by where they stand."""
    found = {f"rule {name}": expression for name, expression in expressions()}
    for panel in dashboard()["panels"]:
        for target in targets(panel):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            found[f"panel {panel['title']} {target['refId']}"] = expression
    return found


def test_every_expression_of_rules_and_dashboard_finds_something(observed: Observed) -> None:
    left = shown()

    def nothing_is_empty() -> bool:
        send_traffic(observed.server.http)
        for place, expression in list(left.items()):
            if observed.prometheus.query(expression):
                del left[place]
        return not left

    try:
        until(nothing_is_empty)
    except AssertionError:
        pytest.fail(f"these find nothing: {left}", pytrace=False)
    rules = observed.prometheus.rules()
    assert len(rules) == len(list(expressions()))
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}


def test_made_up_calibration_does_not_fit_the_traffic(observed: Observed) -> None:
    ratio = 'max(category:rheostat_calibration_distance:ratio{policy="desk"})'

    def drifted() -> bool:
        send_traffic(observed.server.http)
        samples = observed.prometheus.query(ratio)
        return bool(samples) and float(samples[0]["value"][1]) > 1

    until(drifted)

    def pending() -> bool:
        rules = {rule["name"]: rule for rule in observed.prometheus.rules()}
        return bool(rules["RheostatCalibrationDoesNotFit"]["state"] == "pending")

    until(pending)


# OpenTelemetry


def spans_of(collector: Collector, trace_id: str) -> dict[str, list[Exported]]:
    found: dict[str, list[Exported]] = {}
    for span in list(collector.spans):
        if span.trace_id == trace_id:
            found.setdefault(span.name, []).append(span)
    return found


@pytest.mark.parametrize("streamed", [False, True])
def test_span_of_a_request_joins_the_callers_and_the_engines(
    observed: Observed, manifest: Manifest, streamed: bool
) -> None:
    trace_id = PARENT[0].replace("c", "d" if streamed else "e")
    headers = {"traceparent": f"00-{trace_id}-{PARENT[1]}-01"}
    dials = {"report": True, "categories": {"humanizing": "always", "safety": "never"}}
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 3, "refusal": dials}
    observed.server.http.post(CHAT, json={**body, "stream": streamed}, headers=headers)

    until(lambda: {"chat demo", "llm_request"} <= spans_of(observed.collector, trace_id).keys())
    found = spans_of(observed.collector, trace_id)
    (ours,) = found["chat demo"]
    assert ours.parent_id == PARENT[1]
    assert {span.parent_id for span in found["llm_request"]} == {ours.span_id}
    attributes = ours.attributes
    assert attributes["gen_ai.request.max_tokens"] == 3
    assert attributes["http.response.status_code"] == 200
    assert attributes["rheostat.policy"] == "desk"
    assert attributes["rheostat.decision"] == ["refuse"]
    assert attributes["rheostat.category"][0] in ("humanizing", "safety")
    assert attributes["rheostat.clamped"] == ["safety:floor"]
    assert {f"rheostat.margin.{name}" for name in manifest.names} <= attributes.keys()


def test_every_route_that_decides_has_one_span_and_no_text(observed: Observed) -> None:
    trace_id = PARENT[0].replace("c", "f")
    with http_client(observed.server.url, traceparent=f"00-{trace_id}-{PARENT[1]}-01") as http:
        send_traffic(http)

    def routes() -> list[str]:
        named = spans_of(observed.collector, trace_id).values()
        attributes = [span.attributes for spans in named for span in spans]
        return [each["http.route"] for each in attributes if "http.route" in each]

    # 14 chats, a stream, two rejected, and one on each of four routes.
    until(lambda: len(routes()) == 21)
    assert set(routes()) == {CHAT, "/v1/completions", "/v1/messages", "/v1/responses", SCORE}
    assert "zanzibar" not in str(observed.collector.spans)


# logs


def test_log_is_json_with_request_ids_and_without_text(observed: Observed) -> None:
    log = observed.server.log
    start = len(log.read_text())
    send_traffic(observed.server.http)
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 1}
    for key, status in (("gateway-1", 200), ("gateway-2", 422)):
        sent = {**body, "refusal": {"x": 1} if status == 422 else {}}
        answer = observed.server.http.post(CHAT, json=sent, headers={"x-request-id": key})
        assert answer.status_code == status
    plain = observed.server.http.post(CHAT, json=body).json()["id"]

    lines = [json.loads(line) for line in log.read_text()[start:].splitlines()]
    assert "zanzibar" not in log.read_text()
    access = {
        line["request_id"]: line["message"]
        for line in lines
        if line["name"] == "uvicorn.access" and "request_id" in line
    }
    assert "200" in access["gateway-1"]
    assert "422" in access["gateway-2"]
    assert "200" in access[plain]
