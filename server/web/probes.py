"""What Kubernetes, gateways and Docker ask of a server: has it started, is it ready, does it live.

``/healthz`` says only that the process answers. A probe asks nothing of the engine: one that has
much to do is not dead.
"""

from http import HTTPStatus
from typing import Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.web.admission import Admission
from server.web.errors import failure


class Engine(Protocol):
    """What the probes need of the engine."""

    async def check_health(self) -> None:
        """Raises when the engine cannot answer."""


def build_probe_router(engine: Engine, admission: Admission) -> APIRouter:
    """Builds the router of one server's probes.

    There is no "not yet": the server listens once its engine has decided for the first time.

    Args:
        engine: Says whether it can answer.
        admission: Says whether the server ends.
    """
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that the process answers."""
        return {"status": "alive"}

    @router.get("/livez")
    async def livez() -> Response:
        """Says whether a restart would help: the engine has failed."""
        return _answer(await _failed(engine), "alive")

    @router.get("/startupz")
    async def startupz() -> Response:
        """Says that the engine has decided once."""
        return _answer(await _failed(engine), "started")

    @router.get("/readyz")
    async def readyz() -> Response:
        """Says whether requests should come here."""
        ending = "the server is ending" if admission.draining else None
        return _answer(ending or await _failed(engine), "ready")

    return router


async def _failed(engine: Engine) -> str | None:
    try:
        await engine.check_health()
    except Exception as error:  # noqa: BLE001  any failure of the engine is one
        return f"the engine has failed: {type(error).__name__}"
    return None


def _answer(problem: str | None, well: str) -> Response:
    if problem is None:
        return JSONResponse({"status": well})
    return failure(HTTPStatus.SERVICE_UNAVAILABLE, problem).response()
