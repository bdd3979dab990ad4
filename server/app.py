"""What stands around vLLM's FastAPI app: our routes and our layer of middleware."""

import gc
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.routing import Route

from models.hashes import Hashes, checkpoint_hashes
from models.manifest import Manifest
from server.background import on_daemon
from server.huge_pages import collapse_memory
from server.page.files import build_page_router
from server.policies.reloading import Policies
from server.settings import Settings
from server.telemetry.recorder import MarginRecorder
from server.telemetry.trace import DecisionTrace
from server.web.admission import Admission
from server.web.connection import connection_options
from server.web.guard import Guard
from server.web.middleware import GENERATING, Observer, RefusalMiddleware
from server.web.preflight import PreflightLayer
from server.web.probes import Engine, build_probe_router
from server.web.routes import build_router
from server.web.score import Scorer, ScoreRoute, build_score_router
from server.web.validation import answer_failed, answer_invalid

YOUNG_OBJECTS = 20_000
# vLLM's flags that are uvicorn's settings.
_UVICORN_FLAGS = (
    "enable_ssl_refresh",
    "host",
    "port",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_ciphers",
    "h11_max_incomplete_event_size",
    "h11_max_header_count",
)


@dataclass(frozen=True)
class Service:
    """What all requests of one server share.

    Attributes:
        manifest: The served checkpoint's.
        settings: The operator's.
        policies: Know who calls.
        admission: Counts the answers under way.
        guard: Makes client-typed special tokens ordinary text.
        trace: Gets a line of each request; None without a trace file.
        observers: Hold each request's span open, and its name for the log.
        metrics: Answers scrapes.
    """

    manifest: Manifest
    settings: Settings
    policies: Policies
    admission: Admission
    guard: Guard
    trace: DecisionTrace | None
    observers: tuple[Observer, ...]
    metrics: Route


def surround(app: FastAPI, service: Service, engine: Engine, hashes: Callable[[], Hashes]) -> None:
    """Adds our routes and error handlers to vLLM's app.

    Args:
        app: vLLM's.
        service: Shared by all requests.
        engine: Tells whether it can answer.
        hashes: Returns the checkpoint's; may read all weights the first time.
    """
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(Exception, answer_failed)
    app.router.routes.insert(0, service.metrics)  # before vLLM's
    calibrations = service.policies.served.calibrations
    app.include_router(build_probe_router(engine, service.admission))
    app.include_router(build_router(service.manifest, calibrations, hashes))
    if service.settings.page:
        app.include_router(build_page_router())


def put_layer(
    app: FastAPI, service: Service, *, replaced: object, outside: tuple[object, ...]
) -> None:
    """Puts our layer among vLLM's middleware.

    All other middleware, --middleware's too, sees admitted requests only.

    Args:
        app: vLLM's.
        service: Shared by all requests.
        replaced: The class of vLLM's own authentication.
        outside: Classes of middleware that stay around our layer.
    """
    preflights = Middleware(PreflightLayer, settings=service.settings)
    layer = Middleware(
        RefusalMiddleware,
        manifest=service.manifest,
        settings=service.settings,
        callers=service.policies,
        admission=service.admission,
        guard=service.guard,
        trace=service.trace,
        observers=service.observers,
    )
    theirs = [m for m in app.user_middleware if m.cls is not replaced]
    around = [m for m in theirs if m.cls in outside]
    app.user_middleware[:] = [preflights, *around, layer, *(m for m in theirs if m not in around)]
    app.middleware_stack = None  # build_app has built it already; the next request builds it anew


def add_scores(app: FastAPI, service: Service, scorer: Scorer) -> None:
    """Adds the score route, once vLLM's handlers are there to render its prompts."""
    route = ScoreRoute(service.manifest, scorer, service.guard, service.trace)
    app.include_router(build_score_router(route))


def make_quick(app: FastAPI) -> None:
    """Lowers what every request costs, once everything is in place."""
    # The router, and the middleware that labels vLLM's HTTP metrics, try one route after the other;
    # and the collector looks for cycles after so few new objects that most of them are requests
    # still being answered.
    app.router.routes.sort(key=lambda route: getattr(route, "path", None) not in GENERATING)
    gc.set_threshold(YOUNG_OBJECTS)
    on_daemon(collapse_memory)  # a second or two, for which nobody waits


def http_options(
    args: Namespace, settings: Settings, log_config: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what vLLM is to tell uvicorn.

    Args:
        args: vLLM's flags.
        settings: The operator's.
        log_config: Of uvicorn's loggers; None leaves them as they are.
    """
    return {
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        **{name: getattr(args, name) for name in _UVICORN_FLAGS},
        **connection_options(settings),
        **({} if log_config is None else {"log_config": log_config}),
    }


def open_trace(
    manifest: Manifest,
    settings: Settings,
    requests: tuple[type[BaseModel], ...],
    lock: AbstractContextManager[object] | None,
) -> DecisionTrace | None:
    """Opens the decision trace, where the operator wants one.

    Args:
        manifest: The served checkpoint's.
        settings: The operator's.
        requests: vLLM's bodies, whose fields the trace may name.
        lock: Held by the one process that writes; None: this is the only one.
    """
    if settings.trace_file is None:
        return None
    fields = {name for model in requests for name in model.model_fields}
    return DecisionTrace(
        settings.trace_file,
        manifest.names,
        fields,
        max_bytes=settings.trace_max_bytes,
        files=settings.trace_files,
        lock=lock,
    )


def open_recorder(
    directory: Path,
    manifest: Manifest,
    settings: Settings,
    lock: AbstractContextManager[object] | None,
) -> MarginRecorder | None:
    """Opens the record of margins, where the operator wants one.

    Args:
        directory: The checkpoint's.
        manifest: The checkpoint's.
        settings: The operator's.
        lock: Held by the one process that writes; None: this is the only one.
    """
    if settings.record_file is None:
        return None
    weights = checkpoint_hashes(directory).weights
    return MarginRecorder(
        settings.record_file, settings.record_share, manifest.names, weights, lock=lock
    )
