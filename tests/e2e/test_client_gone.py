"""What a client asked for leaves the engine with the client."""

import asyncio
import time
from typing import Any

import pytest

from tests.e2e.servers import Server, until
from tests.e2e.traffic import (
    CHAT,
    cancelled,
    http_of,
    in_engine,
    long_chat,
    requests_metric,
    under_way,
)

# One, on a machine that has nothing else to do; what is asked for takes several times as long.
LEAVES_WITHIN_S = 2.0
MOST = 128
WIDE: dict[str, Any] = {"n": MOST}
PROMPTS = {"model": "demo", "prompt": ["Hello"] * MOST, "max_tokens": 400, "ignore_eos": True}
RESPONSE = {"model": "demo", "input": "Hello", "max_output_tokens": 480, "ignore_eos": True}
# The other routes do not take `ignore_eos`, and end too soon.
REQUESTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": (CHAT, long_chat(400, **WIDE), MOST),
    "streamed": (CHAT, long_chat(400, **WIDE, stream=True), MOST),
    "decision first": (CHAT, long_chat(400, **WIDE, repetition_penalty=1.1), MOST),
    "decision first, streamed": (
        CHAT,
        long_chat(400, **WIDE, repetition_penalty=1.1, stream=True),
        MOST,
    ),
    "prompts": ("/v1/completions", PROMPTS, MOST),
    "prompts, streamed": ("/v1/completions", {**PROMPTS, "stream": True}, MOST),
    "invocations": ("/invocations", long_chat(400, **WIDE), MOST),
    "responses": ("/v1/responses", RESPONSE, 1),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_work_leaves_the_engine_with_its_client(server: Server, kind: str) -> None:
    path, body, answers = REQUESTS[kind]
    gone = server.metric(requests_metric(path, 499))

    async def leave() -> float:
        async with http_of(server) as client:
            asked = asyncio.create_task(client.post(path, json=body))
            await under_way(server, answers)
            await cancelled(asked)
            left_s = time.monotonic()
            while await asyncio.to_thread(in_engine, server):
                assert time.monotonic() - left_s < LEAVES_WITHIN_S
            return time.monotonic() - left_s

    asyncio.run(leave())
    until(lambda: server.metric(requests_metric(path, 499)) == gone + 1)


def test_client_leaves_while_its_decision_waits_in_the_queue(server: Server) -> None:
    waiting = "vllm:num_requests_waiting{"

    async def leave() -> None:
        async with http_of(server) as client:
            # As many as the engine of a CPU works on at once.
            busy = asyncio.create_task(client.post(CHAT, json=long_chat(400, **WIDE)))
            await under_way(server, MOST)
            queued = long_chat(400, repetition_penalty=1.1)
            asked = [asyncio.create_task(client.post(CHAT, json=queued)) for _ in range(8)]
            await under_way(server, MOST + 8)
            for one in asked:
                await cancelled(one)
            await asyncio.to_thread(until, lambda: server.metric(waiting) == 0)
            assert not busy.done()
            await cancelled(busy)

    asyncio.run(leave())
    until(lambda: in_engine(server) == 0)
