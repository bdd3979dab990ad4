"""A server that scores prompts by what they say, for tests whose subject is the client."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from models.hashes import checkpoint_hashes

NAMES = ("safety", "humanizing")
WORDS = {"safety": "steal", "humanizing": "love"}

Body = dict[str, Any]
Spoil = Callable[[Body, int], tuple[int, Body] | None]


def margins_of(text: str) -> dict[str, float]:
    """Returns margins that a test can work out: 2 where the word is there, else -3, plus length."""
    return {
        name: (2.0 if word in text else -3.0) + len(text) / 1024 for name, word in WORDS.items()
    }


def scored(body: Body) -> Body:
    data = []
    for index, entry in enumerate(body["inputs"]):
        margins = margins_of(entry["messages"][-1]["content"])
        decisions = {name: {"margin": margin, "refused": False} for name, margin in margins.items()}
        data.append({"index": index, "log_normaliser": 9.0, "decisions": decisions})
    return {"object": "list", "data": data}


class ScoreServer:
    """What was asked, and where.

    Attributes:
        url: Its address.
        batches: The bodies of the score requests, in order.
        headers: Theirs.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.batches: list[Body] = []
        self.headers: list[dict[str, str]] = []

    @property
    def prompts(self) -> list[str]:
        return [e["messages"][-1]["content"] for body in self.batches for e in body["inputs"]]


@contextmanager
def score_server(
    model: Path, names: tuple[str, ...] = NAMES, spoil: Spoil | None = None
) -> Iterator[ScoreServer]:
    """Runs one on loopback.

    Args:
        model: The checkpoint that it says it serves.
        names: The categories that it says it has.
        spoil: Given a body and how many came before it, what is answered instead.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer(200, {"data": [{"id": "m"}]})
            else:
                listed = [{"name": name} for name in names]
                self._answer(200, {"data": listed, "hashes": hashes})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                before = len(seen.batches)
                seen.batches.append(body)
                seen.headers.append({key.lower(): value for key, value in self.headers.items()})
            self._answer(*((spoil and spoil(body, before)) or (200, scored(body))))

        def _answer(self, status: int, body: Body) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    hashes = checkpoint_hashes(model).model_dump()
    lock = threading.Lock()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen = ScoreServer(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
