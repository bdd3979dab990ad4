import socket

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from models.errors import ConfigError
from server.settings import Settings
from server.telemetry.listener import PROBES, MetricsApp, bind, metrics_route
from tests.server import wires


def app() -> MetricsApp:
    registry = CollectorRegistry()
    Counter("made:up", "A counter.", registry=registry).inc(7)
    probes = [Route(path, lambda _: PlainTextResponse("probed")) for path in PROBES]
    secret = Route("/v1/models", lambda _: PlainTextResponse("secret"))
    return MetricsApp(Starlette(routes=[*probes, secret]), metrics_route(registry))


def test_metrics_and_probes_need_no_key_and_nothing_else_is_there() -> None:
    with wires.listening(app()) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        # As Prometheus 2 asks.
        scraped = http.get(
            "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"}
        )
        assert (scraped.status_code, "made:up_total 7.0" in scraped.text) == (200, True)
        assert scraped.headers["content-type"].startswith("text/plain; version=")
        assert {http.get(path).text for path in PROBES} == {"probed"}
        assert {"/healthz", "/readyz"} <= PROBES
        for method, path in [
            ("GET", "/v1/models"),
            ("GET", "/"),
            ("GET", "/metrics/"),
            ("GET", "/%6detrics/../v1/models"),
            ("POST", "/metrics"),
            ("POST", "/v1/chat/completions"),
        ]:
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_port_is_bound_on_loopback_unless_told_otherwise() -> None:
    assert bind(Settings()) is None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(ConfigError, match=f"--metrics-port {port} on 127.0.0.1: Address"):
            bind(Settings(metrics_port=port))
    bound = bind(Settings(metrics_port=port))
    assert bound is not None
    with bound:
        assert bound.getsockname() == ("127.0.0.1", port)
