"""JSON lines with request ids, where vLLM's ``--logging-config.formatter json`` asks for them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from server.context import DECISION_CONTEXT
from server.telemetry.denials import valid_request_id
from server.web.answer import Answer
from server.web.gate import Arrival

# The client's own X-Request-Id.
_SENT: ContextVar[str | None] = ContextVar("request_id", default=None)


@contextmanager
def request_named(arrival: Arrival, _: Answer) -> Iterator[None]:
    """Names log records by the client's ``X-Request-Id`` for as long as the block runs."""
    token = _SENT.set(valid_request_id(arrival.headers.get("x-request-id")))
    try:
        yield
    finally:
        _SENT.reset(token)


def log_as_json() -> None:
    """Gives our own log vLLM's format, and the request's id to each record of any log.

    The formatter writes whatever else a record holds.
    """
    (handler,) = logging.getLogger("vllm").handlers
    for own in logging.getLogger("server").handlers:
        own.setFormatter(handler.formatter)
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        request_id = _request_id()
        if request_id is not None:
            record.request_id = request_id
        return record

    logging.setLogRecordFactory(made)


def _request_id() -> str | None:
    sent, context = _SENT.get(), DECISION_CONTEXT.get()
    known = context.request_ids if context is not None else []
    return sent or (known[0] if known else None)
