import asyncio
import threading

import httpx
import pytest
from fastapi import FastAPI

from models.hashes import Hashes
from server.web.routes import build_router
from tests.server.boards import HASHES, calibrations
from tests.server.manifests import MANIFEST
from tests.server.middlewares import steering_app


def get(path: str, *names: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(build_router(MANIFEST, calibrations(*names), lambda: HASHES))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(steering_app(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_categories_are_listed_in_manifest_order() -> None:
    answer = get("/v1/refusal/categories")
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "calibrations": [],
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


def test_categories_say_on_demand_what_the_checkpoint_is() -> None:
    answer = get("/v1/refusal/categories?hashes=true")
    assert answer.json()["hashes"] == HASHES.model_dump()
    assert len(answer.json()["data"]) == 2


def test_weights_are_read_by_one_request_at_a_time() -> None:
    begun, may_end = threading.Semaphore(0), threading.Event()

    def read() -> Hashes:
        begun.release()
        assert may_end.wait(30)
        return HASHES

    app = FastAPI()
    app.include_router(build_router(MANIFEST, calibrations(), read))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(steering_app(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            path = "/v1/refusal/categories?hashes=true"
            asking = [asyncio.create_task(client.get(path)) for _ in range(5)]
            await asyncio.to_thread(begun.acquire)
            assert (await client.get("/v1/refusal/categories")).status_code == 200
            assert not begun.acquire(blocking=False)
            may_end.set()
            return await asyncio.gather(*asking)

    assert [answer.status_code for answer in asyncio.run(ask())] == [200] * 5


def test_calibration_has_its_curves_and_says_what_it_is_bound_to() -> None:
    answer = get("/v1/refusal/calibration", "tenant", "default")
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "refusal.calibration"
    assert (body["name"], body["names"]) == ("default", ["default", "tenant"])
    assert body["created"] == "2026-01-02T03:04:05+00:00"
    assert body["hashes"] == HASHES.model_dump()
    assert body["prompts"] == {"safety": 40, "humanizing": 40, "benign": 100}
    assert [c["name"] for c in body["categories"]] == ["safety", "humanizing"]
    curve = body["categories"][0]["curve"]
    as_trained = next(point for point in curve if point["bias"] == 0)
    assert as_trained["sensitivity"] == 0.5
    assert as_trained["refusal_rate"] == 0.5  # 20 of the 40 margins are positive
    low, high = as_trained["refusal_rate_interval"]
    assert 0.33 < low < 0.35  # Clopper-Pearson for 20 of 40: 0.338 to 0.662
    assert 0.65 < high < 0.67
    assert as_trained["false_refusal_rate"] == 0
    assert as_trained["false_refusal_rate_interval"][1] == pytest.approx(0.0362, abs=1e-4)
    assert [p["bias"] for p in curve] == sorted(p["bias"] for p in curve)
    assert [p["refusal_rate"] for p in curve] == sorted(p["refusal_rate"] for p in curve)


def test_names_of_the_operators_data_files_stay_with_the_operator() -> None:
    assert "secret-tenant" not in get("/v1/refusal/calibration", "default").text


def test_calibration_is_asked_for_by_name() -> None:
    path = "/v1/refusal/calibration?name=tenant"
    assert get(path, "default", "tenant").json()["name"] == "tenant"


@pytest.mark.parametrize("name", ["elsewhere", "../default", "default.safetensors", ""])
def test_unknown_calibration_is_not_found(name: str) -> None:
    answer = get(f"/v1/refusal/calibration?name={name}", "default")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["param"] == "name"
    assert "loaded are default" in error["message"]


def test_without_a_calibration_the_answer_is_the_command_that_makes_one() -> None:
    answer = get("/v1/refusal/calibration")
    assert answer.status_code == 404
    assert "rheostat calibrate --model" in answer.json()["error"]["message"]
