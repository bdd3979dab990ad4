"""The gate before the real server: classes of routes, and paths that try to be another."""

import socket

import pytest

from server.web.access import ROUTES, Access
from tests.e2e.calibrating import KEY, ORIGIN, ROOT_PATH, CalibratedServer
from tests.e2e.servers import OPERATOR, Server, http_client


def raw_request(server: Server, target: str, *, method: str = "POST", head: str = "") -> str:
    """Sends a request line as it is written, which no HTTP client would, and returns the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        body = '{"model": "demo", "prompt": "Hi", "max_tokens": 1}'
        lines = [f"{method} {target} HTTP/1.1", "Host: test", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [head] if head else []
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer.decode("latin-1")


@pytest.mark.parametrize(
    "target",
    [
        "/v1/completions%0A",
        "/v1/completions%00",
        "/v1/completions/",
        "//v1/completions",
        "/v1//completions",
        "/v1/./completions",
        "/v1/../v1/completions",
        "/V1/Completions",
        "/v1/completions;x=1",
        "/v1/completions%3F",
        "/v1%252Fcompletions",
        "/tokenize%0A",
        "/metrics%0A",
        "/metrics/",
        "/metricsx",
        "//metrics",
        "/static/../metrics",
        "/%2e%2e/metrics",
    ],
)
def test_disguised_path_reaches_no_route(server: Server, target: str) -> None:
    for method in ("POST", "GET"):
        answer = raw_request(server, target, method=method)
        assert answer.startswith("HTTP/1.1 404 "), answer
        assert '"not_found_error"' in answer


@pytest.mark.parametrize(
    "target", ["/v1%2Fcompletions", "/%76%31/completions", "http://a/v1/completions"]
)
def test_other_spelling_of_a_path_is_the_same_route(server: Server, target: str) -> None:
    assert raw_request(server, target).startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if route.access in (Access.OPERATOR, Access.OFF)],
    ids=lambda route: f"{route.method}{route.path}",
)
def test_operators_routes_and_those_that_are_off(server: Server, route: object) -> None:
    assert isinstance(route, tuple)
    method, path, access, _ = route
    answer = server.http.request(method, path)
    assert answer.status_code == (401 if access is Access.OPERATOR else 404)
    kind = "authentication_error" if access is Access.OPERATOR else "not_found_error"
    assert answer.json()["error"]["type"] == kind


def test_operator_reads_metrics_documents_and_token_ids(server: Server) -> None:
    with http_client(server.url, **OPERATOR) as client:
        assert client.get("/metrics").text.startswith("# HELP")
        assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
        assert client.get("/docs").status_code == 200
        assert client.head("/docs").status_code == 200
        ids = client.post("/tokenize", json={"model": "demo", "prompt": "Hi"}).json()
        assert ids["count"] > 0
        assert client.get("/v1/models").status_code == 200
        missing = client.post("/sleep")
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "Not Found"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/chat/completions", "/readyz"])
def test_websocket_is_a_request_like_any_other(server: Server, method: str, path: str) -> None:
    upgrade = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n{upgrade}\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.makefile("rb").read()
    plain = server.http.request(method, path)
    assert answer.startswith(f"HTTP/1.1 {plain.status_code} ".encode())
    assert answer.endswith(plain.content)


@pytest.fixture(scope="module")
def keyed(calibrated: CalibratedServer) -> Server:
    return calibrated.server


def test_page_of_an_allowed_origin_may_ask(server: Server, keyed: Server) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    answer = keyed.http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    for path, status in (("/v1/chat/completions", 401), ("/sleepy", 404)):
        refused = keyed.http.post(path, headers=asked)
        assert refused.status_code == status
        assert refused.headers["access-control-allow-origin"] == ORIGIN
    # vLLM allows no other origin by default.
    other = server.http.options("/v1/chat/completions", headers=asked)
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


TENANTS = [r for r in ROUTES if r.access is Access.TENANT]


@pytest.mark.parametrize("route", TENANTS, ids=lambda route: f"{route.method}{route.path}")
@pytest.mark.parametrize("prefix", ["", ROOT_PATH])
def test_every_route_of_a_tenants_wants_its_key(keyed: Server, route: object, prefix: str) -> None:
    assert isinstance(route, tuple)
    method, path, _, _ = route
    statuses = [
        keyed.http.request(method, prefix + path, json={}, headers=headers).status_code
        for headers in ({}, OPERATOR, {"x-api-key": KEY})
    ]
    assert statuses[:2] == [401, 401]
    assert statuses[2] != 401


def test_operators_key_reaches_developers_routes_and_tenants_do_not(keyed: Server) -> None:
    tenant = {"authorization": f"Bearer {KEY}"}
    for prefix in ("", ROOT_PATH):
        asleep = keyed.http.get(f"{prefix}/is_sleeping", headers=OPERATOR)
        assert asleep.json() == {"is_sleeping": False}
        for path in ("/is_sleeping", "/metrics", "/server_info"):
            assert keyed.http.get(prefix + path, headers=tenant).status_code == 401
            assert keyed.http.get(prefix + path, headers=OPERATOR).status_code == 200
    assert keyed.http.get(f"{ROOT_PATH}{ROOT_PATH}/metrics", headers=OPERATOR).status_code == 404
