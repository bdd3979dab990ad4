import asyncio

import httpx
import pytest
from fastapi import FastAPI

from server.routes import build_router
from tests.server.manifests import MANIFEST


class FakeEngine:
    """An engine that is well, or fails with an error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error


def get(path: str, engine: FakeEngine) -> httpx.Response:
    app = FastAPI()
    app.include_router(build_router(MANIFEST, engine))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_categories_are_listed_in_manifest_order() -> None:
    answer = get("/v1/refusal/categories", FakeEngine())
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "data": [
            {
                "object": "refusal.category",
                "name": "safety",
                "description": "",
                "token": "[refuse:safety]",
            },
            {
                "object": "refusal.category",
                "name": "humanizing",
                "description": "",
                "token": "[refuse:humanizing]",
            },
        ],
    }


def test_ready_when_the_engine_is_well() -> None:
    answer = get("/readyz", FakeEngine())
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("error", [RuntimeError("secret path /x"), TimeoutError()])
def test_not_ready_when_the_engine_fails_and_says_no_more_than_the_kind(error: Exception) -> None:
    answer = get("/readyz", FakeEngine(error))
    assert answer.status_code == 503
    assert answer.json() == {"status": "not ready", "reason": type(error).__name__}


def test_alive_whatever_the_engine_does() -> None:
    answer = get("/healthz", FakeEngine(RuntimeError("dead")))
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})
