"""An app behind our layer that fails in every way, and what its client should see of each."""

import asyncio
import itertools
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.policies.book import PolicyBook
from server.settings import Settings
from server.web.middleware import RefusalMiddleware
from server.web.validation import answer_failed
from tests.server.boards import board, wide_admission
from tests.server.guards import GUARD
from tests.server.manifests import MANIFEST

CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer tenant"}
MOST_BODY_BYTES = 2**18


class Kind(NamedTuple):
    """One kind of request.

    Attributes:
        content: Makes the body.
        status: Of the answer; 0 where it breaks off.
        headers: The request's.
        path: Where it goes.
    """

    content: Callable[[], Any]
    status: int
    headers: dict[str, str] = KEY
    path: str = CHAT


class BrokenError(Exception):
    """A fault of the app's."""


async def _in_pieces() -> AsyncIterator[bytes]:
    for _ in range(32):
        yield b" " * (MOST_BODY_BYTES // 8)


def _asks(how: str) -> Callable[[], bytes]:
    return f'{{"how": "{how}"}}'.encode


KINDS = {
    "ok": Kind(_asks("ok"), 200),
    "raises": Kind(_asks("raises"), 500),
    "raises after its answer": Kind(_asks("raises later"), 200),
    "breaks off": Kind(_asks("breaks off"), 0),
    "never answers": Kind(_asks("never answers"), 500),
    "500": Kind(_asks("500"), 500),
    "503": Kind(_asks("503"), 503),
    "422": Kind(_asks("422"), 422),
    "no JSON": Kind(lambda: b"{", 400),
    "no key, large body": Kind(lambda: b" " * MOST_BODY_BYTES, 401, {}),
    "no such path, large body": Kind(lambda: b" " * MOST_BODY_BYTES, 404, KEY, "/v1/nothing"),
    "other encoding": Kind(lambda: b" " * 9000, 415, {**KEY, "content-encoding": "br"}),
    "too large": Kind(lambda: b" " * (4 * MOST_BODY_BYTES), 413),
    "too large, of unknown length": Kind(_in_pieces, 413),
}


async def _answer(request: Request) -> Response:
    how = (await request.json())["how"]
    if how == "raises":
        raise BrokenError
    if how == "breaks off":
        return StreamingResponse(_breaking())
    status = int(how) if how.isdigit() else 200
    return JSONResponse({"how": how}, status)


async def _breaking() -> AsyncIterator[bytes]:
    yield b"half"
    raise BrokenError


async def _route(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    how = (await request.json())["how"]
    if how != "never answers":
        await (await _answer(request))(scope, receive, send)
    if how == "raises later":
        raise BrokenError


def failing_app() -> Starlette:
    """Returns the app, built as vLLM's is: starlette's own middleware outside of ours."""
    settings = Settings(max_body_bytes=MOST_BODY_BYTES)
    callers = PolicyBook.for_everybody(board(), ["tenant"])
    layer = Middleware(
        RefusalMiddleware,
        manifest=MANIFEST,
        settings=settings,
        guard=GUARD,
        callers=callers,
        admission=wide_admission(),
    )
    return Starlette(
        routes=[Route(CHAT, _Endpoint())],
        middleware=[layer],
        exception_handlers={Exception: answer_failed},
    )


class _Endpoint:
    # Starlette takes an object for an ASGI app.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _route(scope, receive, send)


def answers(
    url: str, requests: int, connections: int = 8, *, tls: ssl.SSLContext | None = None
) -> Counter[tuple[str, int | str]]:
    """Sends requests of all kinds on few connections, and counts what became of each kind.

    Args:
        url: The server's.
        requests: How many.
        connections: How many are open at once.
        tls: Of an https address.

    Returns:
        By kind, the statuses; 0 where an answer broke off, the error's name where none came.
    """
    counts: Counter[tuple[str, int | str]] = Counter()
    kinds = itertools.islice(itertools.cycle(KINDS.items()), requests)

    async def work(client: httpx.AsyncClient) -> None:
        for name, kind in kinds:
            counts[name, await _outcome(client, kind)] += 1

    async def send() -> None:
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(
            base_url=url, limits=limits, timeout=30, verify=tls or False
        ) as client:
            await asyncio.gather(*(work(client) for _ in range(connections)))

    asyncio.run(send())
    return counts


async def _outcome(client: httpx.AsyncClient, kind: Kind) -> int | str:
    request = client.build_request("POST", kind.path, content=kind.content(), headers=kind.headers)
    try:
        answer = await client.send(request, stream=True)
    except httpx.TransportError as error:
        return type(error).__name__
    try:
        await answer.aread()
    except httpx.RemoteProtocolError:
        return 0
    finally:
        await answer.aclose()
    return answer.status_code


def expected(requests: int) -> Counter[tuple[str, int | str]]:
    """Returns the counts of ``answers`` where nothing is lost."""
    names = itertools.islice(itertools.cycle(KINDS), requests)
    return Counter((name, KINDS[name].status) for name in names)
