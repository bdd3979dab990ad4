import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.page.files import build_page_router, page_routes, read_page
from server.settings import Settings
from tests.server.middlewares import steering_app
from training.demo_data.render import render

STATIC = Path(__file__).parents[3] / "server" / "page" / "static"
FILES = read_page()
OWN = sorted(path for path in STATIC.glob("*") if path.is_file())


def get(path: str, *, method: str = "GET", page: bool = True, **headers: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(build_page_router())
    layer = steering_app(app, Settings(page=page))
    sent = {name.replace("_", "-"): value for name, value in headers.items()}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(layer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=sent)

    return asyncio.run(ask())


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_served_to_anybody_under_a_strict_policy(path: str) -> None:
    answer = get(path)
    assert answer.status_code == 200
    assert answer.content == FILES[path].body
    assert answer.headers["content-type"].split(";")[0] == FILES[path].media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "trusted-types 'none'" in policy
    assert not any("unsafe" in rule or "http" in rule for rule in policy)


@pytest.mark.parametrize("path", FILES)
def test_page_that_is_off_does_not_exist(path: str) -> None:
    assert get(path, page=False).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/page/files.py",
        "/page/%2e%2e/page/app.js",
        "/page/vendor/",
        "/page/vendor/uPlot.LICENSE",
        "/page/nothing.js",
        "/page/app.js/",
        "//page/app.js",
    ],
)
def test_no_other_path_of_the_page_exists(path: str) -> None:
    assert get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_page_is_only_read(method: str) -> None:
    assert get("/", method=method).status_code == 405


def test_head_has_the_headers_and_no_body() -> None:
    answer = get("/page/app.js", method="HEAD")
    assert answer.status_code == 200
    assert answer.content == b""


def test_file_that_the_browser_has_is_not_sent_again() -> None:
    etag = get("/page/app.js").headers["etag"]
    again = get("/page/app.js", if_none_match=etag)
    assert (again.status_code, again.content) == (304, b"")
    assert get("/page/app.js", if_none_match='"other"').status_code == 200


def test_routes_are_the_files() -> None:
    assert {route.path for route in page_routes()} == set(FILES)
    assert "/" in FILES


def test_demos_prompts_are_those_of_its_evaluation() -> None:
    rows = [json.loads(line) for line in (STATIC / "demo.jsonl").read_text().splitlines()]
    rendered = render(0)["evaluation"][: len(rows)]
    assert rows == [{"prompt": r["prompt"], "category": r["category"]} for r in rendered]
    assert len(rows) == 600


def test_no_module_makes_markup_of_text_or_stores_anything() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
    stored = r"localStorage|sessionStorage|indexedDB|document\.cookie"
    for path in STATIC.rglob("*.js"):
        assert not re.search(f"{forbidden}|{stored}", path.read_text()), path.name


def test_markup_has_no_inline_code_and_no_foreign_address() -> None:
    text = FILES["/"].body.decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|https?:", text)


def test_files_are_small() -> None:
    for path in OWN:
        if path.suffix != ".jsonl":
            assert len(path.read_text().splitlines()) <= 400, path.name
