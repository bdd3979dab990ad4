"""What a request's head and its JSON may hold at most, before anything is made of them."""

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from starlette.types import Scope

from models.errors import RequestError, shortened
from server.settings import PREFIX, Settings

# Beyond it, a number may be none that the engine's own types hold.
_BIGGEST_INTEGER = 2**64
_INT = TypeAdapter(int)


def check_head(scope: Scope, settings: Settings) -> None:
    """Holds the address and the headers to their bounds.

    Raises:
        RequestError: 413 or 414, with the bound and its setting.
    """
    length = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if length > settings.max_url_bytes:
        raise _beyond(
            "the address", length, "max_url_bytes", settings, HTTPStatus.REQUEST_URI_TOO_LONG
        )
    headers = scope["headers"]
    if len(headers) > settings.max_headers:
        raise _beyond("the number of headers", len(headers), "max_headers", settings)
    size = sum(len(name) + len(value) for name, value in headers)
    if size > settings.max_header_bytes:
        raise _beyond("the size of all headers", size, "max_header_bytes", settings)


def read_json(raw: bytes, settings: Settings) -> dict[str, Any]:
    """Returns a body's JSON object.

    Args:
        raw: Not empty.
        settings: The bounds.

    Raises:
        RequestError: It is none, holds what JSON or the engine has no number for, or too much.
    """
    _check_strings(raw, settings)
    body = _parsed(raw)
    if not isinstance(body, dict):
        raise RequestError(
            f"the body must be a JSON object, not {type(body).__name__}",
            status=HTTPStatus.BAD_REQUEST,
        )
    # No container is deeper than there are containers.
    if raw.count(b"[") + raw.count(b"{") > settings.max_body_depth:
        _check_depth(body, settings)
    _check_counts(body, settings)
    return body


def _check_strings(raw: bytes, settings: Settings) -> None:
    # Of a string that ends in a backslash one quote is taken for an escaped one.
    strings = (raw.count(b'"') - raw.count(b'\\"')) // 2
    if strings > settings.max_body_strings:
        raise _beyond(
            "the number of strings in the body",
            strings,
            "max_body_strings",
            settings,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        )


def _parsed(raw: bytes) -> Any:
    # As vLLM's routes parse, so that both read the same: the last of equal keys, the encodings.
    try:
        text = raw.decode(json.detect_encoding(raw))
        body = _JSON.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(body, ensure_ascii=False).encode()
        return body
    except UnicodeError as error:
        raise RequestError(
            "the body holds bytes that are no text, or half of a surrogate pair",
            status=HTTPStatus.BAD_REQUEST,
        ) from error
    except RecursionError as error:
        raise RequestError("the body nests too deeply", status=HTTPStatus.BAD_REQUEST) from error
    except ValueError as error:
        raise RequestError(
            f"the body must be a JSON object: {error}", status=HTTPStatus.BAD_REQUEST
        ) from error


def _no_number(text: str) -> NoReturn:
    shown = shortened(text, 40)
    raise RequestError(
        f"the body holds {shown}, which is no number that can be used here",
        status=HTTPStatus.BAD_REQUEST,
    )


def _integer(text: str) -> int:
    if len(text) > 21 or abs(value := int(text)) >= _BIGGEST_INTEGER:
        _no_number(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _no_number(text)
    return value


_JSON = json.JSONDecoder(parse_constant=_no_number, parse_int=_integer, parse_float=_finite)


def _check_depth(body: dict[str, Any], settings: Settings) -> None:
    level: list[Any] = [body]
    depth = 0
    while level:
        depth += 1
        if depth > settings.max_body_depth:
            raise _beyond(
                "the depth of the body",
                f"more than {settings.max_body_depth}",
                "max_body_depth",
                settings,
                HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]


def prompts_in(body: dict[str, Any]) -> int:
    """Returns how many prompts a body holds: those of a batch, or one."""
    return max(1, _conversations(body.get("messages")), _prompts(body.get("prompt")))


def _check_counts(body: dict[str, Any], settings: Settings) -> None:
    for name, bound, counted in _COUNTS:
        if name in body and (count := counted(body[name])) > getattr(settings, bound):
            raise _beyond(name, count, bound, settings, HTTPStatus.UNPROCESSABLE_ENTITY, name)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _conversations(value: Any) -> int:
    return sum(isinstance(entry, list) for entry in value) if isinstance(value, list) else 0


def _messages(value: Any) -> int:
    # A batch is a list of conversations.
    return _length(value) + (
        sum(_length(entry) for entry in value) if isinstance(value, list) else 0
    )


def _prompts(value: Any) -> int:
    # A list of integers is one prompt.
    return _length(value) if _length(value) and not isinstance(value[0], int) else 0


def _number(value: Any) -> int:
    # As vLLM's models read it: "2" and 2.0 are 2. What they refuse is no number here.
    try:
        return _INT.validate_python(value)
    except ValidationError:
        return 0


_COUNTS: tuple[tuple[str, str, Callable[[Any], int]], ...] = (
    ("messages", "max_messages", _messages),
    ("input", "max_messages", _messages),
    ("messages", "max_inputs", _conversations),
    ("prompt", "max_inputs", _prompts),
    ("documents", "max_inputs", _length),
    ("tools", "max_tools", _length),
    ("n", "max_choices", _number),
)


def _beyond(
    what: str,
    found: object,
    setting: str,
    settings: Settings,
    status: int = HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    param: str | None = None,
) -> RequestError:
    bound = getattr(settings, setting)
    return RequestError(
        f"{what}: {found}, and at most {bound} here ({PREFIX}{setting.upper()})",
        param=param,
        status=status,
    )
