"""One connection: bounds what uvicorn does not, and never closes without having said so.

uvicorn reads heads of any length, waits for them for ever, and closes a connection after an
exception although its answer promised to keep it open: a pooling client loses its next request.
"""

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from models.errors import RequestError
from server.settings import PREFIX, Settings
from server.web.errors import error_response

# Far above the gate's own bounds (server/web/limits.py), which are exact.
MOST_HEAD_BYTES = 2**20
# Closing with unread bytes resets the connection, and the client may lose the answer.
LINGER_S = 30.0
LINGER_IN_SILENCE_S = 5.0
FLUSH_S = 5
_ANSWER = (
    b"HTTP/1.1 %d %s\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


def connection_options(settings: Settings) -> dict[str, Any]:
    """Returns what uvicorn is to be told of its connections."""
    return {
        "http": partial(
            BoundedConnection,
            head_timeout_s=settings.head_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            send_timeout_s=settings.send_timeout_s,
        ),
        "timeout_keep_alive": settings.idle_timeout_s,
        # By then the engine has ended; a client that does not read would hold the process.
        "timeout_graceful_shutdown": FLUSH_S,
        # Else a request of a connection may begin with the variables of the one before.
        "reset_contextvars": True,
        # With a websocket protocol, uvicorn never answers a POST that asks for one.
        "ws": "none",
    }


class BoundedConnection(HttpToolsProtocol):
    """Ends a connection whose next head is too long, or whose head or body does not come in time.

    httptools joins the pieces of a header anew with each one that comes, so a head of 50 MB would
    hold the event loop for minutes.

    Args:
        head_timeout_s: For the whole head, from its first byte or from the connection's start.
        body_timeout_s: For the whole body, from its request's start.
        send_timeout_s: For the client to take what waits to be sent.
    """

    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    # One for all requests of a connection: one of its own would cost a request more than its head.
    _body_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _exchange: "_Exchange"
    _body_until_s = 0.0

    def __init__(
        self,
        *args: Any,
        head_timeout_s: float,
        body_timeout_s: float,
        send_timeout_s: float,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._send_timeout_s = send_timeout_s
        self._head_timeout_s = head_timeout_s
        self._body_timeout_s = body_timeout_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop_waiting()
        for timer in (self._body_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for a client that takes nothing of its answer, which holds a place meanwhile."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Waits no longer."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Takes what came in."""
        self._unset_keepalive_if_required()
        self._feed(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request has too large a head"
                )
                return
        # uvicorn's own timer, for idle connections, has ended with the first byte of anything.
        if self._head_timer is None and not self._is_answering():
            self._await_head()

    def on_message_begin(self) -> None:
        """Starts another head on the same connection."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Ends the head."""
        self._in_head = False
        self._stop_waiting()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends the body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def shutdown(self) -> None:
        """Ends the connection with the server, or as soon as its answer is complete."""
        super().shutdown()
        if self._is_answering() and self.cycle.more_body:
            self.transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._read_on(data[upgrade.args[0] :])
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _read_on(self, rest: bytes) -> None:
        """Reads a request that asks for an upgrade as if it did not: nothing is upgraded.

        httptools drops its body, which Java's and curl's clients send all the same.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT: this is no proxy")
            return
        kept = [header for header in self.headers if header[0] not in (b"connection", b"upgrade")]
        lines = [b"%s: %s\r\n" % header for header in [*kept, (b"connection", b"close")]]
        head = b"%s %s HTTP/1.1\r\n%s\r\n" % (method, self.url, b"".join(lines))
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._feed(head + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._exchange = _Exchange(app, cycle)
        self._body_until_s = self.loop.time() + self._body_timeout_s
        if self._body_timer is None:
            self._await_body(self._body_timeout_s)
        exchange: Any = self._exchange
        super()._start_asgi_task(cycle, exchange)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._end_waiting)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_body(self, wait_s: float) -> None:
        self._body_timer = self.loop.call_later(wait_s, self._end_body)

    def _end_body(self) -> None:
        self._body_timer = None
        if not self._exchange.is_reading:
            return  # the next request waits anew
        left_s = self._body_until_s - self.loop.time()
        if left_s > 0:
            self._await_body(left_s)
        else:
            self._exchange.end_reading(self._body_timeout_s)

    def _end_waiting(self) -> None:
        if self._in_head and self._head_bytes:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the request's head did not come within {self._head_timeout_s:g} s",
            )
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        # Else it would stand in the middle of an answer.
        if not self._is_answering() or not (self.pipeline or self.cycle.response_started):
            if self.cycle is not None:
                self.cycle.disconnected = True  # this is the answer of what it began
            body = bytes(error_response(RequestError(message, status=status)).body)
            phrase = status.phrase.encode()
            self.transport.write(_ANSWER % (status, phrase, len(body), body))
        self.transport.close()


class _Exchange:
    """One request and its answer: ends the reading of a late body, and announces an early end.

    An answer that comes before its request's end says ``Connection: close``. What the client still
    sends is read for a while then, so that the answer reaches it. Answers of 5xx, after which the
    connection ends too, say so themselves (server/web/errors.py).

    Args:
        app: Answers the request.
        cycle: uvicorn's, of the same request.
    """

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._lingers = False
        self._late: RequestError | None = None

    @property
    def is_reading(self) -> bool:
        """Whether the body is still missing, and somebody may wait for it."""
        return self._cycle.more_body and not self._cycle.response_complete

    def end_reading(self, timeout_s: float) -> None:
        """Wakes who waits for the body."""
        self._late = RequestError(
            f"the body did not come within {timeout_s:g} s ({PREFIX}BODY_TIMEOUT_S)",
            status=HTTPStatus.REQUEST_TIMEOUT,
        )
        self._cycle.message_event.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._cycle.more_body:
            send = self._announcing(receive, send)
        try:
            await self._app(scope, self._receive, send)
        except Exception as error:
            if not self._cycle.response_complete:
                raise
            # uvicorn would close a connection that was promised to stay.
            self._cycle.logger.error("Exception in ASGI application\n", exc_info=error)

    async def _receive(self) -> Message:
        message: Any = await self._cycle.receive()
        if self._late is not None and message.get("more_body", False):
            raise self._late
        return cast("Message", message)

    def _announcing(self, receive: Receive, send: Send) -> Send:
        async def announce(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._announce()
            elif self._lingers and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._linger(receive)
                message = {"type": "http.response.body"}
            await send(message)

        return announce

    def _announce(self) -> None:
        cycle = self._cycle
        if cycle.more_body:
            cycle.keep_alive = False  # uvicorn writes the header
        # A client that waits for `100 Continue` has not sent its body.
        self._lingers = cycle.more_body and not cycle.waiting_for_100_continue

    async def _linger(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(LINGER_S):
                while self._cycle.more_body and not self._cycle.disconnected:
                    await asyncio.wait_for(receive(), LINGER_IN_SILENCE_S)
        except TimeoutError:
            pass
