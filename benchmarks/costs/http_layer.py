"""Requests a second and core of both HTTP layers, without sockets: ASGI calls in a process each.

The rate is requests over the process's CPU time, so a busy machine does not lower it.
"""

import asyncio
import json
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from benchmarks.serving.cells import Body, Contender, contenders
from benchmarks.serving.rounds import in_turn
from benchmarks.serving.servers import TENANT_KEY, Site
from models.manifest import load_manifest

PROMPT = "How long do I have to cook potatoes?"


class Order(NamedTuple):
    """A round that a worker is asked for.

    Attributes:
        key: Of the tenant that sends the requests; None sends no key.
    """

    bodies: list[Body]
    key: str | None


class Worker:
    """One app in a process of its own."""

    def __init__(self, kind: Literal["stock", "rheostat"], site: Site) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (kind, site.model, site.folder / "policies.yaml", theirs)
        self._process = context.Process(target=work, args=arguments)
        self._process.start()
        theirs.close()  # else a process that died would be waited for

    def per_core_s(self, order: Order) -> float:
        """Returns the requests a second of CPU time."""
        self._orders.send(order)
        rate: float = self._orders.recv()
        return rate

    def close(self) -> None:
        """Ends the process."""
        self._orders.send(None)
        self._process.join()


def work(kind: str, model: Path, policies: Path, orders: Connection) -> None:
    """Answers orders until None comes."""
    if kind == "rheostat":
        os.environ["RHEOSTAT_POLICY_FILE"] = str(policies)
    # Here, for the parent process needs no vLLM.
    from benchmarks.costs.instant import own_app, stock_app

    async def serve() -> None:
        app = await (own_app if kind == "rheostat" else stock_app)(model)
        while (order := orders.recv()) is not None:
            orders.send(await _rate(app, order))

    asyncio.run(serve())


async def _rate(app: ASGIApp, order: Order) -> float:
    raw = [json.dumps(body).encode() for body in order.bodies]
    start = time.process_time()
    for body in raw:
        await _post(app, body, order.key)
    return len(raw) / (time.process_time() - start)


async def _post(app: ASGIApp, raw: bytes, key: str | None) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
    headers += [(b"host", b"localhost")]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    received = False

    async def receive() -> Message:
        nonlocal received
        if received:
            await asyncio.sleep(3600)  # until the app has answered and stops listening
        received = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"status {message['status']}")

    await app(_scope(headers), receive, send)


def _scope(headers: list[tuple[bytes, bytes]]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


NAMES: tuple[str, ...] = ("stock", "no field", "dials", "report", "floors")
NAMES += ("rates, all equal", "rates, all different")


def measure_http(site: Site, rounds: int, requests: int) -> dict[str, dict[str, list[float]]]:
    """Returns requests a second and core of plain and streamed chats, by contender and round."""
    manifest = load_manifest(site.model)
    ids = tuple(manifest.control_ids)
    known = contenders(tuple(manifest.names), ids, manifest.respond.token)
    row = tuple(known[name] for name in NAMES)
    workers = {kind: Worker(kind, site) for kind in _KINDS}
    try:
        return {
            kind: _measure(workers, row, rounds, requests, stream=kind == "streamed")
            for kind in ("plain", "streamed")
        }
    finally:
        for worker in workers.values():
            worker.close()


_KINDS: tuple[Literal["stock", "rheostat"], ...] = ("stock", "rheostat")


def _measure(
    workers: dict[Any, Worker],
    row: tuple[Contender, ...],
    rounds: int,
    requests: int,
    *,
    stream: bool,
) -> dict[str, list[float]]:
    rng = random.Random(0)
    rates: dict[str, list[float]] = {contender.name: [] for contender in row}
    for turn in range(-1, rounds):
        for contender in in_turn(row, turn):
            bodies = [_body(contender, rng, stream=stream) for _ in range(requests)]
            order = Order(bodies, TENANT_KEY if contender.tenant else None)
            rate = workers[contender.server].per_core_s(order)
            if turn >= 0:
                rates[contender.name].append(rate)
    return rates


def _body(contender: Contender, rng: random.Random, *, stream: bool) -> Body:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 16 + contender.more_tokens,
        "temperature": 0,
        "stream": stream,
        **contender.fields(rng),
    }
