"""Connections to the real server: none is lost, none is held for ever."""

import itertools
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.e2e.servers import OPERATOR, Server
from tests.server.wires import connect, until_closed

CHAT = "/v1/chat/completions"
ASKS: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is 2 plus 2?"}],
    "max_tokens": 1,
}
MALFORMED: list[dict[str, Any]] = [
    {"structured_outputs": 5},
    {"structured_outputs": {"regex": "["}},
    {"response_format": "json"},
    {"response_format": {"type": "json_schema"}},
    {"messages": 5},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"tools": [{"type": "function"}]},
    {"temperature": -1},
    {"logit_bias": {"x": 1}},
    {"n": 0},
    {"max_tokens": 10**9},
    {"refusal": []},
]


def test_no_request_behind_a_malformed_one_is_lost(server: Server) -> None:
    lost: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for wrong in itertools.islice(itertools.cycle(MALFORMED), 240):
            answer = client.post(CHAT, json={**ASKS, **wrong})
            assert answer.is_error, wrong
            closes = answer.headers.get("connection") == "close"
            assert closes == answer.is_server_error, wrong
            try:
                assert client.post(CHAT, json=ASKS).status_code == 200
            except httpx.TransportError:
                lost[json.dumps(wrong)] += 1
    assert not lost


def test_large_body_without_a_route_or_a_key_is_answered(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, status in (("/v1/nothing", 404), ("/tokenize", 401)):
            answer = client.post(path, content=b" " * 10_000_000)
            assert answer.status_code == status
            assert client.get("/readyz").status_code == 200
        answer = client.post(CHAT, content=b" " * 40_000_000)
        assert answer.status_code == 413
        assert client.get("/metrics", headers=OPERATOR).status_code == 200


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_body_of_a_request_for_an_upgrade_is_read(server: Server, upgrade: str) -> None:
    body = json.dumps(ASKS).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    head += "Content-Type: application/json\r\n"
    with connect(server.port) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b'"choices"' in received
