"""What pydantic finds wrong in a request, as one error with one path."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import InitErrorDetails, SchemaValidator, ValidationError
from pydantic_core.core_schema import no_info_after_validator_function
from starlette.requests import Request
from starlette.responses import Response

from models.errors import RequestError, shortened
from server.web.access import route_path
from server.web.errors import error_response, failure

_COLLECTIONS = frozenset({"list", "set", "frozenset", "tuple", "dict"})
NOT_JSON = "send the body as JSON, with Content-Type: application/json"


def stop_at_first_error(*models: type[BaseModel]) -> None:
    """Makes models tell one wrong entry of a collection instead of all, and wrong types as such.

    pydantic tries each wrong entry against every member of a union, and keeps an error for each: of
    4096 empty items of ``/v1/responses`` a million, in 17 s that held the event loop. Validators of
    vLLM's that look into a field before pydantic has checked its type may trip over it, which would
    be an internal error (``structured_outputs: 5``). Parts of a batch's messages are validated at
    once.

    Args:
        models: Changed in place, before anything is built from their schemas.
    """
    for model in models:
        schema: Any = model.__pydantic_core_schema__
        _adapt(schema)
        # By themselves, not of validators that models within it have already.
        model.__pydantic_validator__ = SchemaValidator(schema, _use_prebuilt=False)


def adapt_bodies(app: FastAPI, suffix: str) -> None:
    """Does the same with the bodies of some routes, whose models hold such models.

    Args:
        app: Changed in place.
        suffix: Of the routes' paths.
    """
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path.endswith(suffix) and route.body_field:
            adapter: Any = route.body_field._type_adapter
            schema = adapter.core_schema
            _adapt(schema)
            adapter.validator = SchemaValidator(schema, _use_prebuilt=False)


def _adapt(schema: Any) -> None:
    nodes = [schema]
    for node in nodes:  # which grow on the way
        if isinstance(node, dict):
            kind = node.get("type")  # a field of that name has a schema there
            if isinstance(kind, str) and kind in _COLLECTIONS:
                node["fail_fast"] = True
                if kind == "list" and node["items_schema"]["type"] == "list":
                    _read_entries(node["items_schema"])
            elif kind == "function-before" and isinstance(node.get("function"), dict):
                _join(node)
            nodes.extend(node.values())
        elif isinstance(node, list | tuple):
            nodes.extend(node)


def _read_entries(conversation: dict[str, Any]) -> None:
    # pydantic validates an `Iterable` while it is read, and only the first time. vLLM validates
    # each conversation of a batch once more, and would find nothing left of invalid parts.
    entries = conversation["items_schema"]
    conversation["items_schema"] = no_info_after_validator_function(_read, entries)


def _read(entry: Any) -> Any:
    for name, value in entry.items() if isinstance(entry, dict) else ():
        if isinstance(value, Iterator):
            try:
                entry[name] = list(value)
            except ValidationError as error:
                raise _within(name, error) from error
    return entry


def _within(name: str, error: ValidationError) -> ValidationError:
    lines = [
        InitErrorDetails(
            type=line["type"],
            loc=(name, *line["loc"]),
            input=line["input"],
            ctx=line.get("ctx", {}),
        )
        for line in error.errors()
    ]
    return ValidationError.from_exception_data(error.title, lines)


def _join(node: dict[str, Any]) -> None:
    # One Python function for a chain of validators: pydantic's way to each of them takes as long as
    # the validator itself.
    function, inner = node["function"], node["schema"]
    chain = [function["function"]]
    while inner["type"] == "function-before" and "ref" not in inner:
        following = inner["function"]
        if {**following, "function": None} != {**function, "function": None}:
            break
        chain.append(following["function"])
        inner = inner["schema"]
    node["type"], node["schema"] = "function-wrap", inner
    node["function"] = {**function, "function": _leaving_types(tuple(chain))}


def _leaving_types(chain: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    def validate(value: Any, handler: Callable[[Any], Any], *info: Any) -> Any:
        try:
            for validator in chain:
                value = validator(value, *info)
        except (AttributeError, LookupError, TypeError) as error:
            handler(value)  # it knows which field has the wrong type
            raise ValueError(f"a field is not of its type: {error}") from error
        return handler(value)

    return validate


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
