"""The way of an answer to the client: errors get the API's shape, refusals are said."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.types import Message, Receive, Send

from models.errors import RequestError
from server.apis.shaping import Shaper
from server.context import DecisionContext
from server.web.bodies import CLIENT_GONE, encode
from server.web.errors import SEPARATOR, Failure, failure_in, failure_of, read_failure

Headers = Iterable[tuple[bytes, bytes]]
_WRITTEN_ANEW = frozenset({b"content-type", b"content-length", b"connection"})


class Answer:
    """Passes an answer on: as it is, or shaped as a whole, or event by event.

    A stream is held until the engine has put out something, so that what the engine rejects is an
    error with its status, not an event of a stream that began with 200. vLLM's comments, which keep
    a connection alive while the engine is busy, end the wait.

    Args:
        send: Where it goes.
        path: The route.

    Attributes:
        failure: What the client was told instead of an answer.
        refused: Whether the failure is ours, and vLLM's app was not asked.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._to_client = send
        self._path = path
        # Takes each part of the body that follows.
        self._take: Send = self._send
        self._held: Message | None = None
        self._buffer = b""
        self._context: DecisionContext | None = None
        self._shaper: Shaper | None = None
        self._change: Callable[[Any], Any] | None = None
        self._mark = b""
        self._events_sent = 0
        self._status = 500
        self._is_complete = self._is_unheard = False
        self.failure: Failure | None = None
        self.refused = False

    @property
    def status(self) -> int:
        """HTTP's status; 500 for what ends without an answer, 499 if its client went before."""
        return CLIENT_GONE if self._is_unheard else self._status

    def heeding(self, receive: Receive) -> Receive:
        """Returns a ``receive`` that notes when the client goes before the answer is complete."""

        async def heed() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self._is_complete:
                self._is_unheard = True
            return message

        return heed

    def shape(self, context: DecisionContext, shaper: Shaper, mark: bytes) -> None:
        """Shapes what comes from here on.

        Args:
            context: The request's.
            shaper: Shapes it.
            mark: What the guard put into the request, taken out of answers that repeat it.
        """
        self._context = context
        self._shaper = shaper
        self._change = shaper.shape_answer
        self._mark = mark

    def rewrite(self, change: Callable[[Any], Any]) -> None:
        """Sends what ``change`` makes of the JSON value of an answer of 200."""
        self._change = change

    async def refuse(self, error: RequestError) -> None:
        """Answers with an error of ours, before anything else was asked for an answer."""
        self.refused = True
        headers = (error.headers or {}).items()
        await self._fail(
            failure_of(error), [(name.encode(), value.encode()) for name, value in headers]
        )

    async def end_failed(self) -> bool:
        """Ends a stream whose handler failed; returns whether the engine had rejected the request.

        What else went wrong is a fault that the server should log.
        """
        failure = self._rejection
        if failure is not None and self._take == self._stream:
            if self._held is not None:
                await self._fail(failure, self._held["headers"])
            else:
                event = failure.event(self._path, self._events_sent) + SEPARATOR
                self._take = _drop
                await self._send({"type": "http.response.body", "body": self._unmarked(event)})
        return failure is not None and failure.status < 500

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        else:
            await self._take(message)

    @property
    def _rejection(self) -> Failure | None:
        return None if self._context is None else self._context.failure

    async def _begin(self, message: Message) -> None:
        if message["status"] >= 400:
            self._held, self._take = message, self._error
            return
        if self._shaper is None:
            if self._change is not None and message["status"] == 200:
                self._held, self._take = message, self._shaped
            else:
                await self._start(message)
            return
        media_type = _media_type(message["headers"])
        if media_type.startswith(b"text/event-stream"):
            self._held, self._take = message, self._stream
            return
        if message["status"] == 200:
            message = {**message, "headers": [*message["headers"], *self._shaper.headers()]}
            if self._shaper.needed and media_type.startswith(b"application/json"):
                self._held, self._take = message, self._shaped
                return
        if self._mark:
            self._held, self._take = message, self._whole
        else:
            await self._start(message)

    async def _start(self, message: Message) -> None:
        self._held = None
        self._status = message["status"]
        await self._send(message)

    async def _send(self, message: Message) -> None:
        await self._to_client(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True

    async def _fail(self, failure: Failure, headers: Headers) -> None:
        self.failure = failure = failure.on(self._path)
        body = self._unmarked(encode(failure.body(self._path)))
        kept = [header for header in headers if header[0] not in _WRITTEN_ANEW]
        kept += failure.headers(body)
        await self._start(
            {"type": "http.response.start", "status": failure.status, "headers": kept}
        )
        self._take = _drop
        await self._send({"type": "http.response.body", "body": body})

    async def _error(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if not message.get("more_body", False):
            assert self._held is not None
            # What vLLM makes of a rejection on the way has lost its status, its path or its code.
            body = self._unmarked(self._buffer)
            failure = self._rejection or read_failure(self._held["status"], body)
            await self._fail(failure, self._held["headers"])

    async def _shaped(self, message: Message) -> None:
        assert self._change is not None
        self._buffer += message.get("body", b"")
        if not message.get("more_body", False):
            await self._end_whole(encode(self._change(msgspec.json.decode(self._buffer))))

    async def _whole(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if not message.get("more_body", False):
            await self._end_whole(self._buffer)

    async def _end_whole(self, body: bytes) -> None:
        start = self._held
        assert start is not None
        body = self._unmarked(body)
        headers = [header for header in start["headers"] if header[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        await self._start({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _unmarked(self, body: bytes) -> bytes:
        return body.replace(self._mark, b"") if self._mark else body

    async def _stream(self, message: Message) -> None:
        assert self._shaper is not None
        self._buffer += message.get("body", b"")
        more = message.get("more_body", False)
        if self._held is not None and not await self._begins(self._held, more):
            return
        events, end, self._buffer = self._buffer.rpartition(SEPARATOR)
        if events and self._shaper.needed:
            events = shape_events(events, self._shaper.shape_event)
            end = end if events else b""
        if b"error" in events and (failure := failure_in(events)) is not None:
            events = self._with_failure(events, failure)
        body = events + end
        if not more:
            body += self._buffer
        self._events_sent += body.count(SEPARATOR)
        if body or not more:
            await self._send({**message, "body": self._unmarked(body)})

    async def _begins(self, start: Message, more: bool) -> bool:
        """Returns whether a held stream begins now; where it fails instead, the answer is sent."""
        assert self._context is not None
        failure = self._context.failure or failure_in(self._buffer)
        if failure is not None:
            await self._fail(failure, start["headers"])
            return False
        begins = self._context.started or not more or self._buffer.startswith(b":")
        if begins:
            await self._start(start)
        return begins

    def _with_failure(self, events: bytes, failure: Failure) -> bytes:
        told = self._rejection or failure
        return SEPARATOR.join(
            told.event(self._path, self._events_sent + place) if failure_in(event) else event
            for place, event in enumerate(events.split(SEPARATOR))
        )


def _media_type(headers: Headers) -> bytes:
    for name, value in headers:
        if name == b"content-type":
            return value
    return b""


async def _drop(_: Message) -> None:
    """Takes what follows an answer that is complete."""


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
    objects = shape(msgspec.json.decode(data))
    return SEPARATOR.join(_written(one, named=bool(head)) for one in objects)


def _written(event: dict[str, Any], *, named: bool) -> bytes:
    name = f"event: {event['type']}\n".encode() if named else b""
    return name + b"data: " + encode(event)
