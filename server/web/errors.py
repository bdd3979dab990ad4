"""What went wrong, as each API's clients read it: the one mapping for our errors and vLLM's."""

import json
import re
from typing import Any, NamedTuple

from starlette.responses import Response

from models.errors import ContextLengthError, RequestError, ServiceError, shortened
from server.web.bodies import encode

MOST_MESSAGE = 600
# Stands behind each server-sent event.
SEPARATOR = b"\n\n"
RESPONSES = "/v1/responses"
ANTHROPIC = "/v1/messages"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    414: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}
_PLACES = ("body.", "query.", "path.")
_PROMPTS = {"/v1/completions": "prompt", RESPONSES: "input"}
# vLLM's names for the prompt's length are no fields of a request.
_LENGTHS = frozenset({"input_tokens", "input_text"})
# vLLM writes an error's fields behind its message.
_FIELDS = re.compile(r" \((?:parameter|value)=.*", re.DOTALL)


class Failure(NamedTuple):
    """Why a request has no answer.

    Attributes:
        status: HTTP's, 4xx or 5xx.
        message: One sentence: what was wrong, where, and what would be right.
        param: Path of the offending field, as the request spells it.
        code: Stable identifier for programs.
    """

    status: int
    message: str
    param: str | None
    code: str

    def on(self, path: str) -> "Failure":
        """Returns the failure with the prompt's field as a route names it."""
        named = self.param == "messages" and path in _PROMPTS
        return self._replace(param=_PROMPTS[path]) if named else self

    def body(self, path: str = "") -> dict[str, Any]:
        """Returns the JSON body of the API that a path belongs to."""
        if path.startswith(ANTHROPIC):
            return self._anthropic()
        return {"error": self.on(path)._openai()}

    def event(self, path: str, number: int) -> bytes:
        """Returns the event that ends a stream, without the separator behind it.

        Args:
            path: The route.
            number: How many events stand before it.
        """
        if path == RESPONSES:
            told = {**self.on(path)._openai(), "type": "error", "sequence_number": number}
            return b"event: error\ndata: " + encode(told)
        head = b"event: error\n" if path.startswith(ANTHROPIC) else b""
        return head + b"data: " + encode(self.body(path))

    def response(self, headers: dict[str, str] | None = None, path: str = "") -> Response:
        """Returns the answer in the shape of the API that a path belongs to."""
        body = encode(self.body(path))
        response = Response(body, self.status, headers)
        response.raw_headers = [
            *(header for header in response.raw_headers if header[0] != b"content-length"),
            *self.headers(body),
        ]
        return response

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Returns the headers of the answer; after a fault of the server's no request follows.

        uvicorn closes a connection after an exception without having said so, and a pooling client
        would lose its next request.
        """
        length = b"%d" % len(body)
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        return [*headers, (b"connection", b"close")] if self.status >= 500 else headers

    def _openai(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def _anthropic(self) -> dict[str, Any]:
        kind = "request_too_large" if self.status == 413 else self._openai()["type"]
        kind = "api_error" if self.status >= 500 else kind
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def failure(status: int, message: str, param: str | None = None, code: object = None) -> Failure:
    """Returns a failure in our words for codes and paths.

    Args:
        status: HTTP's.
        message: Of any length; its first line is kept.
        param: A path, as FastAPI or vLLM may spell it.
        code: Ours; anything else is replaced by the one that the status and the path stand for.
    """
    lines = _FIELDS.sub("", message).strip().splitlines() or ["the server gave no reason"]
    if param is not None:
        param = next((param.removeprefix(p) for p in _PLACES if param.startswith(p)), param)
    if param in _LENGTHS:
        param, code = "messages", ContextLengthError.code
    if not isinstance(code, str) or code == RequestError.code:
        default = RequestError.code if status < 500 else ServiceError.code
        code = _CODES.get(status, default)
        if (status, param) == (404, "model"):
            code = "model_not_found"
    return Failure(status, shortened(lines[0], MOST_MESSAGE), param, code)


def failure_of(error: RequestError) -> Failure:
    """Returns what the client is told of an error of ours."""
    return failure(error.status, error.message, error.param, error.code)


def error_response(error: RequestError) -> Response:
    """Returns the answer to an error of ours."""
    return failure_of(error).response(error.headers)


def read_failure(status: int, body: bytes) -> Failure:
    """Returns what an error answer says, in whatever shape it was written."""
    told = _parsed(body)
    error = told.get("error") if isinstance(told, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        param = error.get("param")
        param = param if isinstance(param, str) else None
        return failure(status, error["message"], param, error.get("code"))
    return failure(status, _message(told, body))


def failure_in(events: bytes) -> Failure | None:
    """Returns the failure that one of some events tells."""
    for event in events.split(SEPARATOR) if _may_tell_error(events) else ():
        data = event.partition(b"data: ")[2]
        if event.startswith((b"event: error", b'data: {"error"')):
            code = (_parsed(data) or {}).get("error", {}).get("code")
            status = code if isinstance(code, int) and code >= 400 else 500
            return read_failure(status, data)
    return None


def _may_tell_error(events: bytes) -> bool:
    # Quotes within a text are escaped, so no text of a model holds the first.
    return b'data: {"error"' in events or b"event: error" in events


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _message(told: Any, body: bytes) -> str:
    if isinstance(told, dict):
        for key in ("detail", "error", "message"):
            if isinstance(told.get(key), str):
                return str(told[key])
    return body.decode("utf-8", "replace")
