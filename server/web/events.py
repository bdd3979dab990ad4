"""Server-sent events: the JSON object of one, shaped."""

import json
from collections.abc import Callable
from typing import Any

from server.web.bodies import encode

SEPARATOR = b"\n\n"


def shape_events(events: bytes, shape: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> bytes:
    """Returns whole events, each shaped.

    Args:
        events: Any number of them, the separators between them included and the last one not.
        shape: Gives what stands for an event's object: any number of objects.
    """
    shaped = [_shape_event(event, shape) for event in events.split(SEPARATOR)]
    return SEPARATOR.join(filter(None, shaped))


def _shape_event(event: bytes, shape: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> bytes:
    head, _, data = event.partition(b"data: ")
    if not data.startswith(b"{"):  # the end mark, a comment that keeps the connection alive
        return event
    objects = shape(json.loads(data))
    return SEPARATOR.join(_written(one, named=bool(head)) for one in objects)


def _written(event: dict[str, Any], *, named: bool) -> bytes:
    name = f"event: {event['type']}\n".encode() if named else b""
    return name + b"data: " + encode(event)
