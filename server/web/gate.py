"""Pure ASGI, the outermost of ours: what may come in at all, and who sends it."""

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import RequestError, UnknownCallerError
from server.context import BODY, CALLER
from server.page.files import page_routes
from server.policies.book import Caller, CallerSource
from server.policies.credentials import hash_key, presented_keys
from server.settings import PREFIX, Settings
from server.telemetry import metrics
from server.telemetry.trace import DecisionTrace
from server.web.access import ROUTES, Access, AccessTable, Route, route_path
from server.web.bodies import read_body, replay_body, with_length
from server.web.errors import ErrorShape, Failure, error_response
from server.web.fields import refuse_fields, refuse_headers
from server.web.limits import check_head, read_json, write_json
from server.web.score import CLIENT_GONE

# The label of requests that reach no route.
NO_ROUTE = "none"


class Gate:
    """Lets through what the table of routes allows, within its bounds, from known callers.

    Args:
        app: What stands behind it.
        settings: The bounds and the hash of the operator's key.
        callers: Knows the tenants.
        trace: Is told of what is denied.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        callers: CallerSource,
        trace: DecisionTrace | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._callers = callers
        self._trace = trace
        routes = [*ROUTES, *(page_routes() if settings.page else [])]
        self._table = AccessTable(routes, operator=settings.operator_key_hash is not None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request or lifespan; the server takes no websockets."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        route: Route | None = None

        def failed(failure: Failure) -> None:
            self._deny(failure, route, scope)

        send = ErrorShape(send, route_path(scope), failed)
        try:
            check_head(scope, self._settings)
            if _is_preflight(scope):
                self._table.find(_asked_method(scope), route_path(scope))
                await self._app(scope, receive, send)
                return
            route = self._table.find(scope["method"], route_path(scope))
            if route.access is not Access.OPEN:
                headers = Headers(scope=scope)
                scope = {**scope, **self._identify(route, headers)}
                receive = await self._bounded(route, headers, scope, receive)
        except RequestError as error:
            label = NO_ROUTE if route is None else route.path
            metrics.count_request(label, error.status)
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _deny(self, failure: Failure, route: Route | None, scope: Scope) -> None:
        # A client that has gone was denied nothing.
        if self._trace is None or failure.status in (CLIENT_GONE, *range(500, 600)):
            return
        caller: Caller | None = scope.get(CALLER)
        self._trace.denials.add(
            failure,
            NO_ROUTE if route is None else route.path,
            None if caller is None else caller.tenant,
            Headers(scope=scope).get("x-request-id"),
        )

    def _identify(self, route: Route, headers: Headers) -> dict[str, Any]:
        if route.access is Access.TENANT:
            refuse_headers(headers)
            return {CALLER: self._callers.caller(headers)}
        # Without a hash in the settings the table has no such route.
        known = self._settings.operator_key_hash
        if all(hash_key(key) != known for key in presented_keys(headers)):
            raise UnknownCallerError(
                f"{route.path} is the operator's: send `Authorization: Bearer KEY` with the "
                f"key of {PREFIX}OPERATOR_KEY_HASH"
            )
        return {}

    async def _bounded(
        self, route: Route, headers: Headers, scope: Scope, receive: Receive
    ) -> Receive:
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise RequestError(
                "send the body as it is, without Content-Encoding",
                status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        declared = headers.get("content-length", "")
        if declared.isdigit() and len(declared) < 20:
            self._check_size(int(declared))
        raw = await self._read(receive)
        if raw and route.access is Access.TENANT:
            scope[BODY] = read_json(raw, self._settings)
            refuse_fields(scope[BODY])
            raw = write_json(scope[BODY])
            scope["headers"] = with_length(scope["headers"], len(raw))
        return replay_body(raw, receive)

    async def _read(self, receive: Receive) -> bytes:
        limit_s = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await read_body(receive, self._settings.max_body_bytes)
        except TimeoutError as error:
            raise RequestError(
                f"the body did not come within {limit_s:g} s ({PREFIX}BODY_TIMEOUT_S)",
                status=HTTPStatus.REQUEST_TIMEOUT,
            ) from error

    def _check_size(self, size: int) -> None:
        limit = self._settings.max_body_bytes
        if size > limit:
            raise RequestError(
                f"the body is larger than {limit} bytes ({PREFIX}MAX_BODY_BYTES)",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )


def _is_preflight(scope: Scope) -> bool:
    # vLLM's CORS middleware answers these itself, and they carry no key by their nature.
    return (
        scope["method"] == "OPTIONS"
        and _asked_method(scope) != ""
        and "origin" in Headers(scope=scope)
    )


def _asked_method(scope: Scope) -> str:
    return Headers(scope=scope).get("access-control-request-method", "")
