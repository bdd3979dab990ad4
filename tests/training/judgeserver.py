"""A judge behind an OpenAI-compatible address, for tests of its clients: says what it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Body = dict[str, Any]


class Said(NamedTuple):
    """One HTTP answer of the judge.

    Attributes:
        content: What the model says; bytes are the whole body.
    """

    content: str | bytes | None
    status: int = 200
    refusal: str | None = None


class JudgeServer:
    """What was asked, and where.

    Attributes:
        url: With `/v1`.
        says: What it says from now on.
        bodies: Of the requests, in order.
        most_at_once: The most requests that waited for an answer at a time.
    """

    def __init__(self, port: int, says: "Judging") -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.says = says
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0


Judging = Callable[[Body, int], Said]


@contextmanager
def judge_server(says: Judging) -> Iterator[JudgeServer]:
    """Runs one on loopback.

    Args:
        says: From a request's body and its number, from 0, to the answer.
    """
    lock = threading.Lock()
    waiting = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal waiting
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                number, waiting = len(judge.bodies), waiting + 1
                judge.bodies.append(body)
                judge.keys.append(self.headers["authorization"])
                judge.most_at_once = max(judge.most_at_once, waiting)
            try:
                self._answer(judge.says(body, number))
            finally:
                with lock:
                    waiting -= 1

        def _answer(self, said: Said) -> None:
            raw = said.content if isinstance(said.content, bytes) else _completion(said)
            self.send_response(said.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.send_header("retry-after-ms", "1")  # the client waits no longer
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that waited long enough
                self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = JudgeServer(server.server_port, says)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _completion(said: Said) -> bytes:
    if said.status != 200:
        return json.dumps({"error": {"message": said.content, "type": "x"}}).encode()
    message = {"role": "assistant", "content": said.content, "refusal": said.refusal}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "j"}
    return json.dumps({**body, "choices": [choice]}).encode()
