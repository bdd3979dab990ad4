from collections import Counter

import pytest
from starlette._utils import get_route_path

from models.errors import RequestError
from server.web.access import ROUTES, Access, AccessTable, Route, route_path

TABLE = AccessTable()
OPERATORS = AccessTable(operator=True)


def status(table: AccessTable, method: str, path: str) -> int:
    """Returns what the table answers; 200 where it lets through."""
    try:
        table.find(method, path)
    except RequestError as error:
        return error.status
    return 200


def example(route: Route) -> str:
    return route.path.replace("{path:path}", "a/b.js").replace("{", "").replace("}", "")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method}{route.path}")
def test_every_route_is_reached_as_its_class_says(route: Route) -> None:
    with_key = {Access.OFF: 404}.get(route.access, 200)
    without = {Access.OFF: 404, Access.OPERATOR: 404}.get(route.access, 200)
    assert status(OPERATORS, route.method, example(route)) == with_key
    assert status(TABLE, route.method, example(route)) == without
    if with_key == 200:
        assert OPERATORS.find(route.method, example(route)) is route


def test_no_route_stands_there_twice() -> None:
    assert max(Counter((route.method, route.path) for route in ROUTES).values()) == 1


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/v1",
        "/v1/",
        "/nothing",
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/./v1/chat/completions",
        "/v1/../v1/chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completions\n",
        "/v1/chat/completions\x00",
        "/v1/chat/completions ",
        "/v1/chat/completions;a",
        "/v1%2Fchat/completions",
        "v1/chat/completions",
        "/metrics/",
        "/metricsx",
        "/metrics\n",
        "/tokenize/",
        "/static/",
        "/static/a\nb",
        "/v1/responses/",
        "/v1/responses/a/b",
        "/v1/responses/a\n",
        "/v1/responses/ä",
        "/v1/responses/a/cancel/",
        "/adapters/a/b",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_what_is_not_in_the_table_is_not_there(method: str, path: str) -> None:
    assert status(OPERATORS, method, path) == 404


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("post", "/v1/chat/completions", 405),
        ("HEAD", "/v1/chat/completions", 405),
        ("HEAD", "/healthz", 200),
        ("POST", "/healthz", 405),
        ("GET", "/generative_scoring", 404),
        ("GET", "/v1/realtime", 404),
        ("PUT", "/metrics", 404),
    ],
)
def test_other_methods_of_a_route(method: str, path: str, expected: int) -> None:
    assert status(TABLE, method, path) == expected


def test_other_methods_are_told_in_the_header() -> None:
    with pytest.raises(RequestError) as caught:
        TABLE.find("PUT", "/ping")

    assert caught.value.headers == {"allow": "GET, POST"}


def test_messages_say_what_would_be_right() -> None:
    cases = [
        ("PUT", "/v1/chat/completions", "/v1/chat/completions takes POST, not PUT"),
        ("GET", "/v1/none", "there is no GET /v1/none here"),
        ("POST", "/sleep", "set RHEOSTAT_OPERATOR_KEY_HASH to turn it on"),
        ("POST", "/v1/embeddings", "generates text, so it is not served"),
        ("POST", "/\n" + "x" * 100, "there is no POST '/\\nxx"),
    ]
    for method, path, said in cases:
        with pytest.raises(RequestError) as caught:
            TABLE.find(method, path)
        assert said in caught.value.message
        assert len(caught.value.message) < 200


@pytest.mark.parametrize("root", ["", "/api", "/api/v1"])
@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/api/v1/models", "/api/api/v1/models", "/apiv1/models", "/api", "/api/v1"],
)
def test_path_is_what_the_router_matches(path: str, root: str) -> None:
    scope = {"path": path, "root_path": root}
    # The bare root path is empty for the router, and nowhere in the table.
    assert route_path(scope) == (get_route_path(scope) or root)
