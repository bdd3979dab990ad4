"""Request bodies: read within bounds, with the dials of the headers in them, and handed on."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from models.errors import RequestError
from server.dials.protocol import FIELD, HEADER, POLICY_HEADER, parse_header

LARGE_BYTES = 2**15
# nginx's status for a client that has gone; nobody reads it but the metrics.
CLIENT_GONE = 499
T = TypeVar("T")
P = ParamSpec("P")
_BOOL = TypeAdapter(bool)
_SAY_DIALS = frozenset({HEADER.encode(), POLICY_HEADER.encode()})
# For what a client sent with half of a surrogate pair, which no UTF-8 can hold.
_ASCII_ENCODER = json.JSONEncoder(separators=(",", ":"))


async def aside(size_bytes: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Returns what ``work`` returns; for a large body from a thread, beside the event loop."""
    if size_bytes < LARGE_BYTES:
        return work(*args, **options)
    return await asyncio.to_thread(work, *args, **options)


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """Reads a request's whole body.

    Raises:
        RequestError: It is larger than the limit, the client goes away before its end, or it does
            not come in time (server/web/connection.py).
    """
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the connection ended before the body did", status=CLIENT_GONE)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit_bytes:
            raise RequestError(f"the body is larger than {limit_bytes} bytes", status=413)
        more = message.get("more_body", False)
    return b"".join(parts)


def flag(body: dict[str, Any], name: str) -> bool:
    """Returns a flag as vLLM's models read it: 1 and "true" are true; what they refuse is false."""
    value = body.get(name, False)
    if isinstance(value, bool):
        return value
    try:
        return _BOOL.validate_python(value)
    except ValidationError:
        return False


def encode(value: Any) -> bytes:
    """Returns JSON.

    Raises:
        RequestError: It nests deeper than the writer goes.
    """
    try:
        try:
            return msgspec.json.encode(value)
        except UnicodeEncodeError:
            return _ASCII_ENCODER.encode(value).encode()
    except RecursionError as error:  # what could just be read may be too deep to write again
        raise RequestError("the body nests too deeply", status=400) from error


def with_header_dials(body: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """Returns a body with what ``X-Refusal`` and ``X-Refusal-Policy`` say in it.

    Raises:
        RequestError: A header is wrong, or the body says the same thing too.
    """
    if _SAY_DIALS.isdisjoint([name for name, _ in headers.raw]):
        return body
    dials = headers.getlist(HEADER)
    if dials and FIELD in body:
        raise RequestError(
            "send the dials in the body's `refusal` or in X-Refusal, not in both", param="X-Refusal"
        )
    options = parse_header(",".join(dials)) if dials else body.get(FIELD, {})
    policies = headers.getlist(POLICY_HEADER)
    if not policies:
        return {**body, FIELD: options} if dials else body
    if len(policies) > 1 or (isinstance(options, dict) and "policy" in options):
        raise RequestError(
            "name one policy, in X-Refusal-Policy or in the body's `refusal.policy`",
            param="X-Refusal-Policy",
        )
    if isinstance(options, dict):  # what is none is refused with its place
        options = {**options, "policy": policies[0]}
    return {**body, FIELD: options}


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Returns a request's headers with the length of another body."""
    kept = [header for header in headers if header[0] != b"content-length"]
    return [*kept, (b"content-length", b"%d" % length)]


def replay_body(raw: bytes, receive: Receive) -> Receive:
    """Returns a ``receive`` that gives a body which was already read, then the connection's own."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replay
