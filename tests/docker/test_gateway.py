"""What of the servers is reachable through the gateway, and what comes through unchanged."""

import http.client
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docker import gateway
from tests.docker.gateway import TIMEOUT_S, Gateway, nginx
from tests.docker.upstreams import Upstream, upstreams
from tests.server.failing import answers, expected, failing_app
from tests.server.wires import listening

REQUESTS = 14 * 40


class Site(NamedTuple):
    gateway: Gateway
    upstream: Upstream


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        upstreams("upstream") as (upstream,),
        nginx(tmp_path_factory.mktemp("nginx"), [upstream.port]) as running,
    ):
        yield Site(running, upstream)


def test_configuration_passes_nginx_own_check(tmp_path: Path) -> None:
    gateway.write_site(tmp_path, 8443, [8000, 8001])
    checked = subprocess.run(
        [*gateway.nginx_command(tmp_path), "-t"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr


def test_plain_answer_and_query_come_through(site: Site) -> None:
    answer = site.gateway.send("GET", "/v1/models?a=b")
    assert (answer.status, answer.read()) == (200, b'{"from":"upstream"}')
    assert site.upstream.seen[-1] == ("GET", "/v1/models?a=b")


def test_streamed_event_comes_before_the_next_one_exists(site: Site) -> None:
    answer = site.gateway.send("POST", "/v1/chat/completions", b"{}")
    assert answer.read1() == b"data: first\n\n"
    site.upstream.second_event.set()
    assert answer.read() == b"data: second\n\n"


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "//metrics",
        "/v1/../metrics",
        "/page/..%2fmetrics",
        "/metrics/",
        "/invocations",
        "/docs",
        "/healthz",
        "/readyz",
        "/livez",
        "/startupz",
    ],
)
def test_paths_that_are_not_named_are_404(site: Site, path: str) -> None:
    site.upstream.seen.clear()
    answer = site.gateway.send("GET", path)
    assert answer.status == 404
    assert answer.getheader("content-type") == "application/json"
    assert b'"code":"not_found"' in answer.read()
    assert site.upstream.seen == []


@pytest.mark.parametrize("path", ["/", "/page/app.js"])
def test_page_comes_through(site: Site, path: str) -> None:
    assert site.gateway.send("GET", path).status == 200
    assert site.upstream.seen[-1] == ("GET", path)


def test_plain_http_is_no_way_in(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.gateway.port, timeout=TIMEOUT_S)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 400


def test_body_above_the_limit_is_413_and_never_reaches_the_server(site: Site) -> None:
    site.upstream.seen.clear()
    # The length alone decides: a body need not be sent.
    headers = {"Content-Length": str(32 * 2**20 + 1)}
    answer = site.gateway.send("POST", "/v1/completions", headers=headers)
    assert answer.status == 413
    assert b'"code":"invalid_request"' in answer.read()
    assert site.upstream.seen == []


def test_body_at_the_limit_comes_through_whole(site: Site) -> None:
    answer = site.gateway.send("POST", "/v1/completions", bytes(4 * 2**20))
    assert (answer.status, answer.read()) == (200, b"4194304")


def test_refusal_headers_pass_and_forwarded_address_is_not_the_callers_word(site: Site) -> None:
    sent = {"X-Refusal": "safety=0.9", "X-Forwarded-For": "10.0.0.1"}
    site.gateway.send("GET", "/v1/models", headers=sent)
    headers = site.upstream.headers
    assert headers is not None
    assert headers["x-refusal"] == "safety=0.9"
    assert headers["x-forwarded-proto"] == "https"
    assert headers.get_all("x-forwarded-for") == ["127.0.0.1"]


def test_servers_that_are_gone_are_502_in_the_error_shape(tmp_path: Path) -> None:
    with nginx(tmp_path, [gateway.free_port(), gateway.free_port()]) as running:
        answer = running.send("GET", "/v1/models")
        assert answer.status == 502
        assert b'"code":"service_error"' in answer.read()


def test_no_request_behind_an_error_of_the_server_is_lost(tmp_path: Path) -> None:
    with listening(failing_app()) as upstream, nginx(tmp_path, [upstream]) as running:
        assert answers(running.url, REQUESTS, tls=running.tls()) == expected(REQUESTS)
