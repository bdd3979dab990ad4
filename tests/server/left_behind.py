"""Writes what requests leave in the HTTP process's memory, by kind: blocks a request, as JSON.

Run as ``python -m tests.server.left_behind CHECKPOINT FILE``; the engine answers at once.
"""

import asyncio
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks.costs.instant import own_app
from tests.e2e.soak import BODY, FORMAT, MALFORMED, QUESTION, SCORE
from tests.e2e.traffic import CHAT

Request = tuple[str, bytes]
WARM_UP = 50
COUNTED = 150
ROUNDS = 3


def kinds() -> dict[str, Iterator[Request]]:
    """Returns endless requests of each kind."""
    bodies = {
        "plain": BODY,
        "streamed": {**BODY, "stream": True},
        "structured": {**BODY, "response_format": FORMAT},
        "reported": {**BODY, "refusal": {"report": True}},
    }
    malformed = [
        one if isinstance(one, bytes) else json.dumps(one).encode() for one, _ in MALFORMED
    ]
    scored = json.dumps({"inputs": [{"messages": [QUESTION]}] * 4}).encode()
    return {
        **{
            kind: itertools.repeat((CHAT, json.dumps(body).encode()))
            for kind, body in bodies.items()
        },
        "malformed": ((CHAT, body) for body in itertools.cycle(malformed)),
        "scored": itertools.repeat((SCORE, scored)),
    }


async def left_behind(checkpoint: Path) -> dict[str, float]:
    """Returns the blocks that a request of each kind leaves, once caches are filled."""
    transport = httpx.ASGITransport(await own_app(checkpoint))
    requests = kinds()
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

        async def send(kind: str, count: int) -> None:
            for path, body in itertools.islice(requests[kind], count):
                answer = await client.post(
                    path, content=body, headers={"content-type": "application/json"}
                )
                assert answer.is_client_error if kind == "malformed" else answer.is_success, answer

        async def left(kind: str) -> float:
            gc.collect()
            before = sys.getallocatedblocks()
            await send(kind, COUNTED)
            gc.collect()
            return (sys.getallocatedblocks() - before) / COUNTED

        for kind in [*requests, *requests]:
            await send(kind, WARM_UP)
        # A cache that fills once is not in every round; a leak is.
        return {kind: min([await left(kind) for _ in range(ROUNDS)]) for kind in requests}


if __name__ == "__main__":
    found = asyncio.run(left_behind(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(found))
