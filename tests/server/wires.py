"""A real uvicorn on loopback with our connections, for tests of what goes over the wire."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from server.settings import Settings
from server.web.connection import connection_options


@contextmanager
def listening(
    app: Any,
    *,
    head_timeout_s: float = 30,
    idle_timeout_s: float = 30,
    body_timeout_s: float = 30,
    send_timeout_s: float = 30,
) -> Iterator[int]:
    """Serves an app as server/engine.py does, and gives its port."""
    settings = Settings(
        head_timeout_s=head_timeout_s,
        idle_timeout_s=idle_timeout_s,
        body_timeout_s=body_timeout_s,
        send_timeout_s=send_timeout_s,
    )
    options = connection_options(settings)
    config = uvicorn.Config(app, lifespan="off", log_level="critical", **options)
    server = uvicorn.Server(config)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)
        port: int = sock.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def until_closed(connection: socket.socket) -> bytes:
    """Returns all that the server sends before it closes the connection."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received
