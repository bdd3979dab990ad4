import asyncio

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from server.policies.credentials import hash_key
from server.settings import Settings
from server.web.preflight import PreflightLayer

CHAT = "/v1/chat/completions"
PREFLIGHT = {"origin": "http://page", "access-control-request-method": "POST"}


def ask(
    method: str, path: str, headers: dict[str, str], settings: Settings | None = None
) -> httpx.Response:
    cors = CORSMiddleware(PlainTextResponse("in"), allow_origins=["*"], allow_methods=["*"])
    app = PreflightLayer(cors, settings=settings or Settings())

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


def counted(status: str) -> float:
    labels = {"model_name": "", "route": "none", "status": status}
    return REGISTRY.get_sample_value("rheostat_requests_total", labels) or 0


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/nowhere", PREFLIGHT, 404, "not_found"),
        ("/metrics", PREFLIGHT, 404, "not_found"),  # without an operator's key there is none
        ("/v1/embeddings", PREFLIGHT, 404, "not_found"),
        (CHAT, {**PREFLIGHT, "access-control-request-method": "PUT"}, 405, "method_not_allowed"),
        (CHAT, {**PREFLIGHT, "x-long": "a" * 70_000}, 413, "request_too_large"),
        (f"{CHAT}?{'a' * 9000}", PREFLIGHT, 414, "request_too_large"),
    ],
)
def test_preflight_of_no_route_or_beyond_a_bound_is_refused(
    path: str, headers: dict[str, str], status: int, code: str
) -> None:
    before = counted(str(status))
    answer = ask("OPTIONS", path, headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert counted(str(status)) == before + 1


def test_refused_preflight_has_the_shape_of_its_api() -> None:
    wrong = {**PREFLIGHT, "access-control-request-method": "PUT"}
    assert ask("OPTIONS", "/v1/messages", wrong).json()["type"] == "error"


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/refusal/score"])
def test_preflight_of_a_route_is_answered(path: str) -> None:
    answer = ask("OPTIONS", path, PREFLIGHT)
    assert (answer.status_code, answer.text) == (200, "OK")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_preflight_of_the_operators_routes_needs_them_to_exist() -> None:
    settings = Settings(operator_key_hash=hash_key("operator"))
    asked = {**PREFLIGHT, "access-control-request-method": "GET"}
    assert ask("OPTIONS", "/metrics", asked, settings).status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_what_is_no_preflight_passes(method: str) -> None:
    assert ask(method, "/nowhere", {}).text == "in"
