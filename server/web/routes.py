"""The routes that vLLM's server does not have."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.errors import RequestError
from models.hashes import Hashes
from models.manifest import Manifest
from server.context import CALLER
from server.dials.calibrations import DEFAULT_CALIBRATION, Calibrations
from server.policies.book import Caller
from server.web.bodies import encode
from server.web.errors import error_response

Result = TypeVar("Result")


def build_router(
    manifest: Manifest,
    calibrations: Calibrations,
    served: Callable[[], Hashes],
) -> APIRouter:
    """Builds the router of one served checkpoint.

    Args:
        manifest: Its manifest.
        calibrations: The checkpoint's.
        served: Returns its hashes; may read all weights the first time.
    """
    router = APIRouter()
    hashing, describing = asyncio.Lock(), asyncio.Lock()

    @router.get("/v1/refusal/categories")
    async def categories(hashes: bool = False) -> dict[str, Any]:
        """Lists what can be dialled, in the order that breaks ties; on demand, of which weights."""
        return {
            "object": "list",
            "calibrations": calibrations.names,
            **({"hashes": (await _alone(hashing, served)).model_dump()} if hashes else {}),
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

    @router.get("/v1/refusal/calibration")
    async def calibration(name: str = DEFAULT_CALIBRATION) -> Response:
        """Returns a calibration's curves: bias, sensitivity, refused and falsely refused."""
        try:
            calibrations.require(name, param="name", status=HTTPStatus.NOT_FOUND)
        except RequestError as error:
            return error_response(error)
        curves = await _alone(describing, lambda: encode(calibrations.describe(name)))
        return Response(curves, media_type="application/json")

    @router.get("/v1/refusal/policies")
    async def policies(request: Request) -> Response:
        """Lists what the caller may choose from, the default first, with its bounds."""
        caller: Caller = request.scope[CALLER]
        answer = {
            "object": "list",
            "tenant": caller.tenant,
            "data": [policy.describe() for policy in caller.policies],
        }
        return Response(encode(answer), media_type="application/json")

    return router


async def _alone(turn: asyncio.Lock, work: Callable[[], Result]) -> Result:
    # In a thread, and in one only: it takes long the first time, and not after that.
    async with turn:
        return await asyncio.to_thread(work)
