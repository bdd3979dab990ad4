"""A server that answers every chat at once and keeps what it was asked."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answering(NamedTuple):
    """The running server.

    Attributes:
        bodies: Of all requests so far.
        keys: Their ``Authorization`` headers.
    """

    url: str
    bodies: list[dict[str, Any]]
    keys: list[str | None]


@contextmanager
def answering(status: int = 200) -> Iterator[Answering]:
    """Starts one on loopback."""
    bodies: list[dict[str, Any]] = []
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            keys.append(self.headers["Authorization"])
            chunk = json.dumps({"choices": [{"delta": {"content": "a"}}]})
            streamed = f"data: {chunk}\n\ndata: [DONE]\n\n"
            self.send(status, streamed if body.get("stream") else "{}")

        def do_GET(self) -> None:
            self.send(404, "")

        def send(self, code: int, text: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Answering(f"http://127.0.0.1:{server.server_port}", bodies, keys)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
