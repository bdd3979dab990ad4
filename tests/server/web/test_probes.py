import asyncio

import httpx
import pytest
from fastapi import FastAPI

from server.web.admission import Admission
from server.web.probes import build_probe_router
from tests.server.boards import wide_admission
from tests.server.middlewares import steering_app


class FakeEngine:
    """An engine that is well, or fails with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error


def get(
    path: str, error: Exception | None = None, admission: Admission | None = None
) -> httpx.Response:
    admission = admission or wide_admission()
    app = FastAPI()
    app.include_router(build_probe_router(FakeEngine(error), admission))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(steering_app(app, admission=admission))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


WELL = {"/healthz": "alive", "/livez": "alive", "/startupz": "started", "/readyz": "ready"}


@pytest.mark.parametrize("path", WELL)
def test_probes_of_a_server_that_is_well(path: str) -> None:
    answer = get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": WELL[path]})


@pytest.mark.parametrize("path", ["/livez", "/startupz", "/readyz"])
@pytest.mark.parametrize("error", [RuntimeError("secret path /x"), TimeoutError()])
def test_failed_engine_is_told_by_its_kind_only(path: str, error: Exception) -> None:
    answer = get(path, error)
    assert answer.status_code == 503
    assert answer.json()["error"] == {
        "message": f"the engine has failed: {type(error).__name__}",
        "type": "server_error",
        "param": None,
        "code": "service_error",
    }


def test_process_answers_whatever_the_engine_does() -> None:
    assert get("/healthz", RuntimeError("dead")).status_code == 200


@pytest.mark.parametrize("full", [False, True])
def test_server_that_ends_lives_but_is_not_ready(full: bool) -> None:
    ending = Admission(0 if full else 1, 0)
    ending.drain()
    statuses = {path: get(path, admission=ending).status_code for path in WELL}
    assert statuses == {"/healthz": 200, "/livez": 200, "/startupz": 200, "/readyz": 503}


def test_full_server_is_ready() -> None:
    assert get("/readyz", admission=Admission(0, 0)).status_code == 200
