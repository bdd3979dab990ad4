"""What docs/security.md says of routes and fields, and what an app of vLLM's registers."""

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
ROUTES_OF = {
    "chat": "/v1/chat/completions",
    "batch": "/v1/chat/completions/batch",
    "text": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "count": "/v1/messages/count_tokens",
}


def field_rows() -> dict[str, tuple[list[str], str]]:
    """Returns the routes and the kind of each field that the page lists."""
    rows = re.findall(r"^\| (`.+?`) \| ([\w, ]+) \| \*\*([\w ]+)\*\*", PAGE, re.MULTILINE)
    return {
        field: (routes.split(", "), kind)
        for fields, routes, kind in rows
        for field in re.findall(r"\w+", fields)
    }


def registered_fields(document: Any) -> dict[str, list[str]]:
    """Returns the routes of each field that vLLM's OpenAPI document lists."""
    known: dict[str, list[str]] = {}
    for name, path in ROUTES_OF.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for field in document["components"]["schemas"][schema]["properties"]:
            known.setdefault(field, []).append(name)
    return known


def registered_routes(app: Any) -> set[tuple[str, str]]:
    """Returns every route of what tests/e2e/vllm_app.py printed, mounts included."""
    return {(method, path) for method, path in app["plain"] + app["everything"]}
