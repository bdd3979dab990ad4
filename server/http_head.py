"""Bounds a request's head while it is read; uvicorn itself reads heads of any length."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Far above the gate's own bounds (server/limits.py), which are exact and answer in OpenAI's shape.
MOST_HEAD_BYTES = 2**20
_ANSWER = (
    b"HTTP/1.1 413 Request Entity Too Large\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)
_BODY = (
    b'{"error":{"message":"the request has too large a head","type":"invalid_request_error",'
    b'"param":null,"code":"invalid_request"}}'
)


class BoundedHead(HttpToolsProtocol):
    """Closes a connection whose request line and headers do not end in time.

    httptools joins the pieces of a header anew with each one that comes, so a head of 50 MB would
    hold the event loop for minutes.
    """

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Takes what came in."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MOST_HEAD_BYTES:
            self.transport.write(_ANSWER % (len(_BODY), _BODY))
            self.transport.close()

    def on_message_begin(self) -> None:
        """Starts another head on the same connection."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Ends the head."""
        self._in_head = False
        super().on_headers_complete()
