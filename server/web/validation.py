"""What pydantic finds wrong in a request, as one error with one path."""

from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import Response

from models.errors import RequestError, shortened
from server.web.access import route_path
from server.web.errors import error_response, failure

NOT_JSON = "send the body as JSON, with Content-Type: application/json"


def first_problem(errors: Sequence[Any], value: Any) -> RequestError:
    """Returns the problem whose path leads deepest into a value.

    A union tells what is wrong with each of its kinds. The value fits that kind best which its
    deepest path belongs to, and of several the one with the fewest problems.

    Args:
        errors: As pydantic lists them, not empty.
        value: What was validated.
    """
    told = [_place(error["loc"], value, error["type"]) for error in errors]
    beside = Counter(place.branch for place in told)
    place, first = min(
        zip(told, errors, strict=True),
        key=lambda one: (-len(one[0].path), beside[one[0].branch]),
    )
    param = ".".join(place.path) or None
    said = first["msg"].removeprefix("Value error, ")
    message = f"{param}: {said}" if param else said
    return RequestError(message, param=param, status=HTTPStatus.BAD_REQUEST)


class _Place(NamedTuple):
    path: list[str]
    branch: tuple[Any, ...]


def _place(loc: Sequence[Any], value: Any, kind: str) -> _Place:
    # pydantic's own marks (kinds of a union, validators) stand between the fields; whatever leads
    # into the value is a field.
    path = []
    branch: tuple[Any, ...] = ()
    for place, part in enumerate(loc):
        inside = isinstance(value, dict) and part in value
        inside |= isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside:
            value = value[part]
        if inside or (kind == "missing" and place == len(loc) - 1):
            path.append(shortened(str(part)))
            branch = tuple(loc[:place])
    return _Place(path, branch)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """Answers what FastAPI found wrong in a request, in the place of vLLM's handler."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if isinstance(errors[0], str):  # vLLM's word for another media type
        status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        return error_response(RequestError(NOT_JSON, param="Content-Type", status=status))
    place = errors[0]["loc"][0]
    values = {"body": error.body, "query": dict(request.query_params), "path": request.path_params}
    within = [{**one, "loc": one["loc"][1:]} for one in errors]
    return error_response(first_problem(within, values.get(place)))


async def answer_failed(request: Request, error: Exception) -> Response:
    """Answers after a fault of the server, which tells no more of itself; its log does."""
    told = failure(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why")
    return told.response(path=route_path(request.scope))
