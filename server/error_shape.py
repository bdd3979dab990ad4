"""Errors that starlette, its middleware or a route of vLLM's tell in a shape of their own."""

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from models.errors import RequestError, ServiceError
from server.bodies import encode


class ErrorShape:
    """Passes an answer on; an error without OpenAI's body gets one.

    Args:
        send: Where it goes.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._end(self._start)

    async def _end(self, start: Message) -> None:
        told = _parsed(self._body)
        if not _is_shaped(told):
            self._body = encode(_error(start["status"], _message(told, self._body)))
            headers = MutableHeaders(raw=list(start.get("headers", [])))
            headers["content-type"] = "application/json"
            headers["content-length"] = str(len(self._body))
            start = {**start, "headers": headers.raw}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": self._body})


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _is_shaped(told: Any) -> bool:
    # Anthropic's clients know their own shape, which holds the message in the same place.
    error = told.get("error") if isinstance(told, dict) else None
    return isinstance(error, dict) and isinstance(error.get("message"), str)


def _message(told: Any, body: bytes) -> str:
    if isinstance(told, dict):
        for key in ("detail", "error", "message"):
            if isinstance(told.get(key), str):
                return str(told[key])
    return body.decode("utf-8", "replace").strip() or "the server gave no reason"


def _error(status: int, message: str) -> dict[str, Any]:
    ours = status >= 500
    return {
        "error": {
            "message": message,
            "type": "server_error" if ours else "invalid_request_error",
            "param": None,
            "code": ServiceError.code if ours else RequestError.code,
        }
    }
