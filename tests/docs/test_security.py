"""docs/security.md against the table that the gate follows, and both against vLLM's own app."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.errors import (
    ContextLengthError,
    ExpiredKeyError,
    NotAllowedError,
    QueueFullError,
    RequestError,
    TenantFullError,
    UnavailableError,
    UnknownCallerError,
)
from server.settings import Settings
from server.web.access import ROUTES, Access
from server.web.errors import failure
from server.web.middleware import GENERATING
from tests.docs.tables import (
    PAGE,
    ROUTES_OF,
    field_rows,
    registered_fields,
    registered_routes,
)
from tests.e2e.attacks import REFUSED
from tests.toy import save_toy

ROOT = Path(__file__).parents[2]
WHO = {"anybody": Access.OPEN, "a tenant": Access.TENANT, "the operator": Access.OPERATOR}
WHO["nobody"] = Access.OFF
# vLLM registers them only with a package that is not installed, and a switch that is refused here.
NEEDS_COHERE = {("POST", "/cohere/v2/chat"), ("POST", "/cohere/v2/chat/render")}
# Of vLLM 0.33 (tests/server/test_new_vllm.py), and of no installed version yet.
NEWER_ROUTES = {("POST", "/v1/decisions")}
NEWER_FIELDS = {
    "return_weight_versions": ["chat", "text"],
    "spaces_between_special_tokens": ["responses"],
    "prompt_cache_options": ["responses"],
    "prompt_cache_retention": ["responses"],
    "safety_identifier": ["responses"],
}
# What a mount serves is a route to us, and its own to vLLM; SageMaker's are mounted by its package.
MOUNTED = {("GET", "/metrics"), ("GET", "/static/{path:path}")}


@pytest.fixture(scope="module")
def vllm_app(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's app registers, asked of a process of its own."""
    model = tmp_path_factory.mktemp("model")
    save_toy(model)
    script = [sys.executable, "-m", "tests.e2e.vllm_app", str(model)]
    printed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    app: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return app


def ours() -> set[tuple[str, str]]:
    return {(route.method, route.path) for route in ROUTES}


def test_page_lists_exactly_the_routes_of_the_table() -> None:
    rows = re.findall(r"^\| (`[A-Z]+ /.+?`) \| ([\w ]+) \| .+ \|$", PAGE, re.MULTILINE)
    listed = [
        (method, path, WHO[who])
        for routes, who in rows
        for method, path in re.findall(r"`(\w+) (/\S+)`", routes)
    ]
    assert sorted(listed) == sorted((route.method, route.path, route.access) for route in ROUTES)


def test_every_route_of_vllms_is_in_the_table(vllm_app: dict[str, Any]) -> None:
    registered = registered_routes(vllm_app)
    mounts = {path for method, path in registered if method == "MOUNT"}
    assert mounts == {"/metrics", "/static"}
    unknown = {route for route in registered if route[0] != "MOUNT"} - ours()
    assert unknown == set(), "vLLM has routes that server/web/access.py does not know"


def test_table_names_no_route_that_vllm_does_not_have(vllm_app: dict[str, Any]) -> None:
    registered = registered_routes(vllm_app)
    own = {route for route in ours() if "/refusal/" in route[1] or route[1].endswith("z")}
    assert ours() - registered - own - NEEDS_COHERE - NEWER_ROUTES == MOUNTED - registered


def test_page_lists_every_bound_with_its_default() -> None:
    rows = re.findall(r"^\| `RHEOSTAT_(MAX_\w+)` \| (\d+)( KiB| MiB)?", PAGE, re.MULTILINE)
    units = {"": 1, " KiB": 2**10, " MiB": 2**20}
    listed = {name.lower(): int(number) * units[unit] for name, number, unit in rows}
    fields = Settings.model_fields.items()
    bounds = {name: field.default for name, field in fields if name.startswith("max_")}
    assert bounds.pop("max_waiting") is None  # what the engine works on is vLLM's to say
    assert listed == bounds


def test_page_lists_every_time_out_with_its_default() -> None:
    rows = re.findall(r"^\| `RHEOSTAT_(\w+_TIMEOUT_S)` \| (\d+)", PAGE, re.MULTILINE)
    fields = Settings.model_fields.items()
    assert {name.lower(): float(value) for name, value in rows} == {
        name: field.default for name, field in fields if name.endswith("_timeout_s")
    }


KINDS = {"refused", "checked", "guarded", "decision first", "bounded", "harmless"}


def test_page_knows_every_field_of_vllms_and_no_other(vllm_app: dict[str, Any]) -> None:
    known = registered_fields(vllm_app["openapi"])
    for field, routes in NEWER_FIELDS.items():
        known[field] = sorted([*known.get(field, []), *routes], key=list(ROUTES_OF).index)
    assert {field: routes for field, (routes, _) in field_rows().items()} == known


def test_every_generating_route_has_its_fields_on_the_page() -> None:
    without = {"/invocations"}  # its body has no schema of its own
    unread = {"/inference/v1/generate"}  # off
    assert GENERATING - without - unread == set(ROUTES_OF.values()) - {ROUTES_OF["count"]}


def test_fields_are_of_a_known_kind_and_the_refused_ones_are_tested() -> None:
    rows = field_rows()
    assert {kind for _, kind in rows.values()} <= KINDS
    refused = {field for field, (_, kind) in rows.items() if kind == "refused"}
    assert refused == set(REFUSED)
    for field, examples in REFUSED.items():
        assert {name for name, _ in examples} == set(rows[field][0]), field


def test_page_lists_the_errors_that_clients_get() -> None:
    rows = re.findall(
        r"^\| ([\d, ]+) \| [^|]+ \| `(\w+)` \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 13
    for statuses, openai, anthropic, codes in rows:
        for status in map(int, statuses.split(", ")):
            told = failure(status, "m")
            assert told.body()["error"]["type"] == openai
            assert told.body("/v1/messages")["error"]["type"] == anthropic
            errors: list[type[RequestError]] = [
                UnknownCallerError,
                ExpiredKeyError,
                NotAllowedError,
                ContextLengthError,
                QueueFullError,
                TenantFullError,
                UnavailableError,
            ]
            own = {e.code for e in errors if e("m").status == status}
            found = {failure(status, "m", "model").code}
            said = set(re.findall(r"`(\w+)`", codes))
            assert said == own | (found | {told.code} if status not in (401, 403) else set())
