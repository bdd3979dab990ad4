"""Small servers in the place of Rheostat's, which note what the gateway sends them."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.docker.gateway import TIMEOUT_S

BREAKS = "/v1/breaks"
READS_NOTHING = "/v1/reads-nothing"


class Upstream(ThreadingHTTPServer):
    """Answers as the server would; a stream's second event waits for ``second_event``.

    Attributes:
        name: Stands in every answer.
        seen: Methods and paths that arrived.
        headers: Of the last request.
    """

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = name
        self.second_event = threading.Event()
        self.seen: list[tuple[str, str]] = []
        self.headers: Message | None = None

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self._note()
        if self.path == BREAKS:
            self._break()
        else:
            self._answer(f'{{"from":"{self.server.name}"}}'.encode())

    def do_POST(self) -> None:
        if self.path == READS_NOTHING:
            self._note()
            self._break()
            return
        body = self.rfile.read(int(self.headers["content-length"]))
        self._note()
        if self.path == BREAKS:
            self._break()
        elif self.path == "/v1/chat/completions":
            self._stream()
        else:
            self._answer(str(len(body)).encode())

    def log_message(self, *_: object) -> None:
        pass

    def _note(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.server.headers = self.headers

    def _break(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: first\n\n")
        self.server.second_event.wait(TIMEOUT_S)
        self._chunk(b"data: second\n\n")
        self._chunk(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def upstreams(*names: str) -> Iterator[list[Upstream]]:
    """Runs servers of these names."""
    servers = [Upstream(name) for name in names]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
