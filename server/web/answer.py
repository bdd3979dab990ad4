"""The way of vLLM's answer to the client: shaped, and rejected where it only seems to begin."""

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from server.apis.shaping import Shaper
from server.context import DecisionContext
from server.web.bodies import encode
from server.web.errors import Failure, failure_in
from server.web.events import SEPARATOR, shape_events


class Answer:
    """Passes an answer on: as it is, or shaped as a whole, or event by event.

    A stream is held until the engine has put out something, so that what the engine rejects is an
    error with its status, not an event of a stream that began with 200. vLLM's comments, which keep
    a connection alive while the engine is busy, end the wait.

    Args:
        send: Where it goes.
        path: The route.

    Attributes:
        status: HTTP's; 500 until it is known, for what ends without an answer.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self._context: DecisionContext | None = None
        self._shaper: Shaper | None = None
        self._mark = b""
        self._held_start: Message | None = None
        self._streams = False
        self._shapes = False
        self._ended = False
        self._buffer = b""
        self._events_sent = 0
        self.status = 500

    def shape(self, context: DecisionContext, shaper: Shaper, mark: bytes) -> None:
        """Shapes what comes from here on.

        Args:
            context: The request's.
            shaper: Shapes it.
            mark: What the guard put into the request, taken out of answers that repeat it.
        """
        self._context = context
        self._shaper = shaper
        self._mark = mark

    async def end_failed(self) -> bool:
        """Ends a stream whose handler failed; returns whether the engine had rejected the request.

        What else went wrong is a fault that the server should log.
        """
        failure = self._context.failure if self._context is not None else None
        if failure is not None and self._streams and not self._ended:
            if self._held_start is not None:
                await self._fail(failure)
            else:
                event = failure.event(self._path, self._events_sent) + SEPARATOR
                await self._end(event)
        return failure is not None and failure.status < 500

    async def __call__(self, message: Message) -> None:
        """Takes one message of the answer."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._streams:
            await self._events(message)
        elif self._held_start is not None:
            await self._whole(message)
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        if self._context is None or self._shaper is None:
            await self._send_start(message)
            return
        if message["status"] >= 400 and self._context.failure is not None:
            # What vLLM makes of it on the way has lost its status, its path or its code.
            await self._fail(self._context.failure)
            return
        content_type = Headers(raw=message["headers"]).get("content-type", "")
        self._streams = content_type.startswith("text/event-stream")
        if message["status"] == 200 and not self._streams:
            message = {**message, "headers": [*message["headers"], *self._shaper.headers()]}
            self._shapes = self._shaper.needed and content_type.startswith("application/json")
        if self._streams or self._shapes or self._mark:
            self._held_start = message
        else:
            await self._send_start(message)

    async def _send_start(self, message: Message) -> None:
        self._held_start = None
        self.status = message["status"]
        await self._send(message)

    async def _fail(self, failure: Failure) -> None:
        body = self._unmarked(encode(failure.body()))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send_start(
            {"type": "http.response.start", "status": failure.status, "headers": headers}
        )
        await self._end(body)

    async def _end(self, body: bytes) -> None:
        self._ended = True
        await self._send({"type": "http.response.body", "body": self._unmarked(body)})

    async def _whole(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        if message.get("more_body", False):
            return
        start = self._held_start
        assert start is not None
        body = self._buffer
        if self._shapes and self._shaper is not None:
            body = encode(self._shaper.shape_answer(json.loads(body)))
        body = self._unmarked(body)
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        await self._send_start({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})

    def _unmarked(self, body: bytes) -> bytes:
        return body.replace(self._mark, b"") if self._mark else body

    async def _events(self, message: Message) -> None:
        self._buffer += message.get("body", b"")
        more = message.get("more_body", False)
        if self._held_start is not None and not await self._begins(self._held_start, more):
            return
        events, end, self._buffer = self._buffer.rpartition(SEPARATOR)
        if events and self._shaper is not None and self._shaper.needed:
            events = shape_events(events, self._shaper.shape_event)
            end = end if events else b""
        if (failure := failure_in(events)) is not None:
            events = self._with_failure(events, failure)
        body = events + end
        if not more:
            body += self._buffer
        self._events_sent += body.count(SEPARATOR)
        if body or not more:
            await self._send({**message, "body": self._unmarked(body)})

    async def _begins(self, start: Message, more: bool) -> bool:
        """Returns whether a held stream begins now; where it fails instead, the answer is sent."""
        context = self._context
        assert context is not None
        failure = context.failure or failure_in(self._buffer)
        if failure is not None:
            await self._fail(failure)
            return False
        begins = context.started or not more or self._buffer.startswith(b":")
        if begins:
            await self._send_start(start)
        return begins

    def _with_failure(self, events: bytes, failure: Failure) -> bytes:
        assert self._context is not None
        told = self._context.failure or failure
        return SEPARATOR.join(
            told.event(self._path, self._events_sent + place) if failure_in(event) else event
            for place, event in enumerate(events.split(SEPARATOR))
        )
