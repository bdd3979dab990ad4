"""A load that costs little: prepared requests over connections that stay open.

vLLM's own load takes more of the processor than what is measured here.
"""

import asyncio
import random
import ssl
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import uvloop

_END = b"\r\n\r\n"
_CHUNKS_END = b"0\r\n\r\n"


class Load(NamedTuple):
    """What is sent, and where.

    Attributes:
        port: On this machine.
        requests: In full, as bytes; one after the other, again and again.
        tls: Of the gateway; None: not encrypted.
    """

    port: int
    requests: Sequence[bytes]
    tls: ssl.SSLContext | None = None


class Found(NamedTuple):
    """What became of a load.

    Attributes:
        latencies_s: Of each request.
        sent_s: When each was sent, or began to wait for a connection; timers round to about 1 ms.
            Nothing where requests follow each other.
        seconds: From the first to the last.
        client_s: Processor time of this process.
    """

    latencies_s: list[float]
    sent_s: list[float]
    seconds: float
    client_s: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies_s) / self.seconds


def chat(body: bytes, key: str) -> bytes:
    """Returns a request for a chat, in full."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def closed(load: Load, connections: int, count: int) -> Found:
    """Sends requests as fast as they are answered, over so many connections."""
    return uvloop.run(_closed(load, connections, count))


def opened(load: Load, rate: float, count: int, connections: int, seed: int = 0) -> Found:
    """Sends requests at random times (a Poisson process), whether others are answered or not.

    Args:
        load: What is sent.
        rate: Requests a second.
        count: How many.
        connections: The most at once; more requests wait here.
        seed: Of the times.
    """
    return uvloop.run(_opened(load, rate, count, connections, seed))


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._got = bytearray()
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._answered is not None and _is_whole(self._got):
            if not self._got.startswith(b"HTTP/1.1 200"):
                self._answered.set_exception(RuntimeError(bytes(self._got[:600]).decode()))
            else:
                self._answered.set_result(None)
            self._answered = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None:
            self._answered.set_exception(exc or ConnectionError("closed"))

    async def ask(self, request: bytes) -> None:
        """Sends a request and waits for its whole answer."""
        self._got.clear()
        self._answered = answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await answered

    def close(self) -> None:
        self._transport.close()


def _is_whole(got: bytearray) -> bool:
    head_end = got.find(_END)
    if head_end < 0:
        return False
    head = bytes(got[:head_end]).lower()
    place = head.find(b"content-length:")
    if place < 0:
        return got.endswith(_CHUNKS_END)
    length = int(head[place + 15 :].split(b"\r\n", 1)[0])
    return len(got) >= head_end + len(_END) + length


async def _connect(load: Load) -> _Connection:
    loop = asyncio.get_running_loop()
    name = "localhost" if load.tls is not None else None
    _, connection = await loop.create_connection(
        _Connection, "127.0.0.1", load.port, ssl=load.tls, server_hostname=name
    )
    return connection


async def _closed(load: Load, connections: int, count: int) -> Found:
    opened = [await _connect(load) for _ in range(connections)]
    latencies: list[float] = []
    left = iter(range(count))

    async def work(connection: _Connection) -> None:
        for number in left:
            began_s = time.perf_counter()
            await connection.ask(load.requests[number % len(load.requests)])
            latencies.append(time.perf_counter() - began_s)

    began_s, client_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(connection) for connection in opened))
    found = Found(latencies, [], time.perf_counter() - began_s, time.process_time() - client_s)
    for connection in opened:
        connection.close()
    return found


async def _opened(load: Load, rate: float, count: int, connections: int, seed: int) -> Found:
    free = deque([await _connect(load) for _ in range(connections)])
    every = list(free)
    freed = asyncio.Semaphore(connections)
    latencies: list[float] = []
    sent: list[float] = []
    rng = random.Random(seed)
    began_s, client_s = time.perf_counter(), time.process_time()

    async def send(number: int) -> None:
        sent_s = time.perf_counter()
        sent.append(sent_s)
        async with freed:
            connection = free.popleft()
            await connection.ask(load.requests[number % len(load.requests)])
            free.append(connection)
        latencies.append(time.perf_counter() - sent_s)

    tasks, due_s = [], began_s
    for number in range(count):
        due_s += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(send(number)))
    await asyncio.gather(*tasks)
    found = Found(latencies, sent, time.perf_counter() - began_s, time.process_time() - client_s)
    for connection in every:
        connection.close()
    return found
