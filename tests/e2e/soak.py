"""Mixed load for a while, with the client's own counts of everything that the server counts too."""

import asyncio
import gc
import itertools
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.e2e.servers import Server
from tests.e2e.traffic import CHAT, http_of

SCORE = "/v1/refusal/score"
AT_ONCE = 8
SAMPLE_EVERY_S = 1.0
QUESTION = {"role": "user", "content": "What is the capital of France?"}
BODY: dict[str, Any] = {"model": "demo", "messages": [QUESTION], "max_tokens": 24}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
# Much longer than the client stays.
LEFT = {**BODY, "n": 16, "max_tokens": 400, "ignore_eos": True, "refusal": {"policy": "left"}}
MALFORMED: list[tuple[bytes | dict[str, Any], int]] = [
    (b"{", 400),
    ({**BODY, "temperature": -1}, 400),
    ({**BODY, "refusal": []}, 422),
    ({**BODY, "messages": 5}, 400),
    ({**BODY, "model": "other"}, 404),
]


@dataclass
class Counts:
    """What one client saw.

    Attributes:
        requests: By route and status; 499 for those that it left.
        decisions: Choices of answers that were waited for.
        scored: Prompts.
        lost: Requests without an answer.
        waited_s: Of each plain request.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    decisions: int = 0
    scored: int = 0
    lost: int = 0
    waited_s: list[float] = field(default_factory=list)


class Load:
    """Sends requests of every kind in turn.

    Args:
        server: Gets them.
        key: Of a tenant that may follow the policies ``open`` and ``left``.
        counts: Where they are counted.
    """

    def __init__(self, server: Server, key: str, counts: Counts) -> None:
        self._server = server
        self._key = key
        self._counts = counts

    async def run(self, seconds: float) -> None:
        """Sends so long, several requests at once."""
        # A collection takes half a second among all that the tests have imported. Answers that
        # should be left would be complete by then.
        gc.freeze()
        until_s = time.monotonic() + seconds
        async with http_of(self._server, authorization=f"Bearer {self._key}") as client:
            await asyncio.gather(*(self._worker(client, i, until_s) for i in range(AT_ONCE)))
        gc.unfreeze()

    async def _worker(self, client: httpx.AsyncClient, number: int, until_s: float) -> None:
        malformed = itertools.cycle(MALFORMED)
        kinds: Iterator[Callable[[], Awaitable[None]]] = itertools.cycle(
            [
                lambda: self._answered(client, BODY),
                lambda: self._answered(client, {**BODY, "stream": True, "n": 2}),
                lambda: self._answered(client, {**BODY, "response_format": FORMAT}),
                lambda: self._left(LEFT),
                lambda: self._answered(client, {**BODY, "refusal": {"report": True}}),
                lambda: self._malformed(client, *next(malformed)),
                lambda: self._scored(client, 4),
                lambda: self._left({**LEFT, "stream": True}),
            ]
        )
        for kind in itertools.islice(kinds, number, None):
            if time.monotonic() >= until_s:
                return
            await kind()

    async def _post(self, client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response | None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            answer = await client.post(
                path, content=raw, headers={"content-type": "application/json"}
            )
        except httpx.TransportError:
            self._counts.lost += 1
            return None
        self._counts.requests[path, answer.status_code] += 1
        return answer

    async def _answered(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        asked_s = time.monotonic()
        answer = await self._post(client, CHAT, body)
        if answer is None:
            return
        assert answer.status_code == 200, answer.text
        if body.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n"), answer.text
        self._counts.decisions += body.get("n", 1)
        if body is BODY:
            self._counts.waited_s.append(time.monotonic() - asked_s)

    async def _malformed(
        self, client: httpx.AsyncClient, body: bytes | dict[str, Any], status: int
    ) -> None:
        answer = await self._post(client, CHAT, body)
        assert answer is None or answer.status_code == status, answer.text

    async def _scored(self, client: httpx.AsyncClient, prompts: int) -> None:
        answer = await self._post(client, SCORE, {"inputs": [{"messages": [QUESTION]}] * prompts})
        assert answer is None or answer.status_code == 200, answer.text
        self._counts.scored += prompts

    async def _left(self, body: dict[str, Any]) -> None:
        """Leaves a stream at its first bytes, and a plain answer soon, if it has not come by then.

        On a connection of its own, so that the request is known to be sent.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self._key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        status = 499
        try:
            async with asyncio.timeout(None if body.get("stream") else 0.05):
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                status = 499 if body.get("stream") else 200
        except TimeoutError:
            pass
        writer.close()
        self._counts.requests[CHAT, status] += 1


class Memory:
    """Samples the resident memory of a server's processes, without what files and others share.

    The system reads pages of libraries, and drops them, as it likes.
    """

    def __init__(self, server: Server) -> None:
        serving = psutil.Process(server.process.pid)
        children = serving.children(recursive=True)
        named = {one.name(): one for one in children if one.name().startswith("VLLM::")}
        self._processes = {"server": serving, **named}
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in self._processes}

    async def watch(self) -> None:
        """Samples until it is cancelled; seconds and MB."""
        started_s = time.monotonic()
        while True:
            for name, process in self._processes.items():
                held = process.memory_info()
                mb = (held.rss - held.shared) / 1e6
                self.samples[name].append((time.monotonic() - started_s, mb))
            await asyncio.sleep(SAMPLE_EVERY_S)
