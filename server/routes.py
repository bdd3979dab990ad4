"""The routes that vLLM's server does not have."""

from http import HTTPStatus
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from models.manifest import Manifest


class Health(Protocol):
    """What readiness needs of the engine."""

    async def check_health(self) -> None:
        """Raises when the engine cannot answer."""


def build_router(manifest: Manifest, engine: Health) -> APIRouter:
    """Builds the router of one served checkpoint."""
    router = APIRouter()

    @router.get("/v1/refusal/categories")
    async def categories() -> dict[str, Any]:
        """Lists what can be dialled, in the order that breaks ties."""
        return {
            "object": "list",
            "data": [
                {
                    "object": "refusal.category",
                    "name": category.name,
                    "description": category.description,
                    "token": category.token,
                }
                for category in manifest.categories
            ],
        }

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Says that the process answers."""
        return {"status": "alive"}

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """Says whether the engine can take requests."""
        try:
            await engine.check_health()
        except Exception as error:  # noqa: BLE001  any failure of the engine means: not ready
            return JSONResponse(
                {"status": "not ready", "reason": type(error).__name__},
                status_code=HTTPStatus.SERVICE_UNAVAILABLE,
            )
        return JSONResponse({"status": "ready"})

    return router
