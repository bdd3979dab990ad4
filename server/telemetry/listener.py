"""The second listener: metrics and probes, without a key, for what brings none.

Endpoint pickers, ServiceMonitors and kubelets send no key. It listens on loopback unless told
otherwise, and answers nothing but these paths, by GET.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import ConfigError
from server.settings import Settings
from server.web.access import ROUTES, Access
from server.web.connection import BoundedConnection, connection_options
from server.web.errors import failure

METRICS = "/metrics"
PROBES = frozenset(
    route.path for route in ROUTES if route.access is Access.OPEN and route.method == "GET"
)
# A scrape encodes every series; more at once would only be slower.
MOST_CONNECTIONS = 64
_ELSEWHERE = f"this listener has GET {METRICS} and probes only"


def metrics_route(registry: CollectorRegistry) -> Route:
    """Returns the route of the metrics, in Prometheus' plain format.

    vLLM's own route answers Prometheus 2 in OpenMetrics, in which prometheus-client 0.26 writes
    `vllm_` for `vllm:`: no dashboard finds those series.

    Args:
        registry: What is scraped.
    """

    async def metrics(_: Request) -> Response:
        # In a thread, so that no request waits for it.
        body = await asyncio.to_thread(generate_latest, registry)
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return Route(METRICS, metrics)


class MetricsApp:
    """Answers scrapes itself, and passes probes to the server's own routes.

    Args:
        app: The server's, behind its gate.
        metrics: Answers scrapes.
    """

    def __init__(self, app: ASGIApp, metrics: Route) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; there is no lifespan here."""
        answer: ASGIApp = failure(HTTPStatus.NOT_FOUND, _ELSEWHERE).response()
        if scope["method"] in ("GET", "HEAD") and scope["path"] == METRICS:
            answer = self._metrics.handle
        elif scope["method"] in ("GET", "HEAD") and scope["path"] in PROBES:
            answer = self._app
        await answer(scope, receive, send)


class _Unlogged(BoundedConnection):
    """Probes and scrapes would fill the access log, which both listeners share."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to the server of the main port."""
        yield


def bind(settings: Settings) -> socket.socket | None:
    """Returns the listener's socket, bound before the engine loads; None without a port.

    Raises:
        ConfigError: The address is not free, or none of this machine's.
    """
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        return None
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"--metrics-port {port} on {host}: {error.strerror}") from error
    return sock


@asynccontextmanager
async def listening(
    app: ASGIApp, sock: socket.socket | None, settings: Settings
) -> AsyncIterator[None]:
    """Answers on a socket for as long as the block runs.

    Args:
        app: Answers.
        sock: Bound; closed at the end. None: nothing listens.
        settings: The operator's bounds of connections.
    """
    if sock is None:
        yield
        return
    options = connection_options(settings)
    options["http"] = partial(_Unlogged, **options["http"].keywords)
    options["limit_concurrency"] = MOST_CONNECTIONS
    config = uvicorn.Config(app, lifespan="off", log_config=None, **options)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        sock.close()
