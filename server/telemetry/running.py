"""What runs beside the requests of one server, so that it can be seen from outside."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from models.manifest import Manifest
from server.background import repeated
from server.policies.loading import Served
from server.policies.reloading import Policies
from server.settings import Settings
from server.telemetry import metrics
from server.telemetry.fit import FitWatch, show_ages
from server.telemetry.logs import log_as_json, request_named
from server.telemetry.recorder import MarginRecorder
from server.telemetry.spans import RequestSpans
from server.telemetry.trace import DecisionTrace
from server.web.middleware import COUNTED, Observer

LOOK_EVERY_S = 1.0


class Engine(Protocol):
    """What is shown of the engine."""

    @property
    def errored(self) -> bool:
        """Whether it can answer no more."""


@asynccontextmanager
async def observing(
    engine: Engine,
    settings: Settings,
    policies: Policies,
    trace: DecisionTrace | None,
    recorder: MarginRecorder | None,
    *,
    tests: bool,
) -> AsyncIterator[None]:
    """Writes trace and margins, tests calibrations, and shows the engine, while the block runs.

    Args:
        engine: Shown.
        settings: The operator's.
        policies: Those in force.
        trace: Written.
        recorder: Written.
        tests: Whether this process tests the calibrations: one of several does.
    """
    calibrations = policies.served.calibrations.loaded
    show_ages(calibrations)

    async def look(_: bool) -> None:
        metrics.child(metrics.ENGINE_UP).set(not engine.errored)

    await look(False)
    async with AsyncExitStack() as running:
        await running.enter_async_context(repeated(look, LOOK_EVERY_S, finishes=False))
        if recorder is not None:
            await running.enter_async_context(recorder.flushing())
        if recorder is not None and tests:
            fit = FitWatch(
                recorder,
                calibrations,
                lambda: policies.book.policies,
                every_s=settings.check_every_s,
            )
            await running.enter_async_context(fit.watching())
        if trace is not None:
            await running.enter_async_context(trace.writing())
        yield


def name_server(model_name: str, vllm: str, served: Served) -> None:
    """Names what all series belong to, before there are any.

    Args:
        model_name: The first served name.
        vllm: vLLM's version.
        served: The weights' hash is known where there is a calibration.
    """
    metrics.name_model(model_name)
    hashes = [each.info.hashes.weights for each in served.calibrations.loaded.values()]
    weights = hashes[0][:12] if hashes else ""
    metrics.show_build({"version": _version(), "vllm": vllm, "weights": weights})


def _version() -> str:
    try:
        return version("rheostat")
    except PackageNotFoundError:
        return "not installed"  # python -m rheostat in a checkout


def observers(
    manifest: Manifest, model_name: str, *, spans: bool, json: bool
) -> tuple[Observer, ...]:
    """Returns what holds each request's span open, and its name for the log.

    Args:
        manifest: The served checkpoint's.
        model_name: The first served name.
        spans: Whether vLLM exports spans.
        json: Whether vLLM's log is JSON; then ours becomes it too.
    """
    if json:
        log_as_json()
    made = [RequestSpans(manifest.names, model_name, COUNTED)] if spans else []
    return (*([request_named] if json else []), *made)
