"""A server behind the middleware, and requests to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from models.manifest import Manifest
from server.context import DECISION_CONTEXT, Decision, DecisionContext
from server.settings import Settings
from server.web.admission import Admission
from server.web.errors import Failure
from server.web.middleware import Observer, RefusalMiddleware
from tests.server.boards import everybody, wide_admission
from tests.server.guards import GUARD
from tests.server.manifests import MANIFEST

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hello"}
ANSWERED = {"role": "assistant", "content": "Hi"}
SETTINGS = Settings(max_body_bytes=2**20)
Parts = Sequence[bytes]


def steering_app(
    app: ASGIApp,
    settings: Settings = SETTINGS,
    *calibrations: str,
    observers: Sequence[Observer] = (),
    manifest: Manifest = MANIFEST,
    admission: Admission | None = None,
) -> RefusalMiddleware:
    return RefusalMiddleware(
        app,
        manifest=manifest,
        settings=settings,
        callers=everybody(settings.defaults, *calibrations),
        admission=admission or wide_admission(),
        guard=GUARD,
        observers=observers,
    )


def scope_of(path: str) -> Scope:
    """Returns the scope of a POST without headers."""
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}


class FakeServer:
    """Stands where vLLM's server does: records what it got and answers what it is told to.

    Args:
        decisions: What its engine decides, by call and choice.
        parts: The answer's body, one message each; as a stream where the media type is one.
        failure: Why its engine rejects the request before it puts anything out.
    """

    def __init__(
        self,
        decisions: dict[tuple[int, int], Decision] | None = None,
        parts: Parts = (b'{"object": "chat.completion", "choices": []}',),
        *,
        status: int = 200,
        media_type: str = "application/json",
        error: Exception | None = None,
        failure: Failure | None = None,
    ) -> None:
        self.decisions = decisions or {}
        self.parts = parts
        self.status = status
        self.media_type = media_type
        self.error = error
        self.failure = failure
        self.calls = 0
        self.raw = b""
        self.headers: dict[str, str] = {}
        self.context: DecisionContext | None = None

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        more = True
        while more:
            message = await receive()
            self.raw += message.get("body", b"")
            more = message.get("more_body", False)
        self.context = DECISION_CONTEXT.get()
        if self.context is not None:
            self.context.decisions.update(self.decisions)
            self.context.calls = 1 + max((call for call, _ in self.decisions), default=0)
            self.context.failure = self.failure
            self.context.started = self.failure is None
        if self.error is not None:
            raise self.error
        headers = [(b"content-type", self.media_type.encode()), (b"x-request-id", b"7")]
        if "stream" not in self.media_type:
            length = sum(map(len, self.parts))
            headers.append((b"content-length", str(length).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for index, part in enumerate(self.parts):
            more = index < len(self.parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})


def send_to(
    server: FakeServer,
    path: str,
    content: bytes | Any,
    *,
    method: str = "POST",
    settings: Settings = SETTINGS,
    root_path: str = "",
    chunks: int = 0,
    headers: Sequence[tuple[str, str]] = (),
    calibrations: Sequence[str] = (),
    observers: Sequence[Observer] = (),
    manifest: Manifest = MANIFEST,
) -> httpx.Response:
    """Sends one request through the middleware; what is no bytes is sent as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), chunks):
            yield raw[start : start + chunks]

    async def ask() -> httpx.Response:
        app = steering_app(server, settings, *calibrations, observers=observers, manifest=manifest)
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.request(
                method,
                path,
                content=in_chunks() if chunks else raw,
                headers=[("content-type", "application/json"), *headers],
            )
        assert DECISION_CONTEXT.get() is None
        return answer

    return asyncio.run(ask())


def assert_refused(
    answer: httpx.Response,
    server: FakeServer,
    status: int,
    param: str | None,
    code: str = "invalid_request",
) -> str:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"] == param
    assert server.calls == 0
    message: str = error["message"]
    return message
