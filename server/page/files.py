"""The page's files as routes: each one by its own path, nothing else."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.web.access import Access, Route

_STATIC = Path(__file__).with_name("static")
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".jsonl": "application/jsonl",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # The browser itself refuses markup made of text (trusted types), code of any other origin,
    # and requests to one.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class PageFile(NamedTuple):
    """One file, ready to be sent."""

    body: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """Returns the page's files by their paths on the server."""
    files = sorted(path for path in _STATIC.rglob("*") if path.suffix in _MEDIA_TYPES)
    return {_path(path): _read(path) for path in files}


def page_routes() -> list[Route]:
    """Returns what the table of routes must let through: the page's files, for anybody."""
    return [Route("GET", path, Access.OPEN) for path in read_page()]


def build_page_router() -> APIRouter:
    """Builds the routes of the page; they are not in the OpenAPI document."""
    router = APIRouter()
    for path, file in read_page().items():
        router.add_api_route(path, _sending(file), methods=["GET", "HEAD"], include_in_schema=False)
    return router


def _path(file: Path) -> str:
    name = file.relative_to(_STATIC).as_posix()
    return "/" if name == "index.html" else f"/page/{name}"


def _read(file: Path) -> PageFile:
    body = file.read_bytes()
    return PageFile(body, _MEDIA_TYPES[file.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _sending(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    headers = {**_HEADERS, "etag": file.etag}

    async def send(request: Request) -> Response:
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)

    return send
