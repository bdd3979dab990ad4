"""Preflights of a page of another origin, which vLLM's CORS middleware answers before our layer."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import RequestError
from server.settings import Settings
from server.telemetry import metrics
from server.web.access import NO_ROUTE, route_path
from server.web.errors import failure_of
from server.web.gate import served_routes
from server.web.limits import check_head


class PreflightLayer:
    """Lets in preflights of routes that exist, with a head within its bounds.

    Stands around the CORS middleware. All other requests pass.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._table = served_routes(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request or lifespan."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            try:
                self._check(scope)
            except RequestError as error:
                failure = failure_of(error)
                metrics.count_request(NO_ROUTE, failure.status)
                metrics.count_rejection(failure.code)
                answer = failure.response(error.headers, route_path(scope))
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        method = Headers(scope=scope).get("access-control-request-method")
        if method is not None:
            check_head(scope, self._settings)
            self._table.find(method, route_path(scope))
