"""Many requests at once, and what became of each: answered, turned away, failed or lost."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx

from tests.e2e.servers import Server

CHAT = "/v1/chat/completions"
ANSWERED, TURNED_AWAY, FAILED, LOST = "answered", "turned away", "failed", "lost"
ENDS = {"stop", "length", "tool_calls"}


def requests_metric(route: str, status: int) -> str:
    """Returns how the line of the requests with a status begins."""
    return f'rheostat_requests_total{{model_name="demo",route="{route}",status="{status}"}}'


def long_chat(tokens: int, **fields: Any) -> dict[str, Any]:
    """Returns a body whose answers have so many tokens."""
    question = {"role": "user", "content": "Tell me about rivers."}
    never = {"categories": dict.fromkeys(("safety", "humanizing"), "never")}
    body = {"model": "demo", "messages": [question], "refusal": never}
    return {**body, "max_tokens": tokens, "ignore_eos": True, **fields}


def http_of(server: Server, **headers: str) -> httpx.AsyncClient:
    """Returns a client with as many connections as it needs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(
        base_url=server.url, timeout=120, limits=limits, verify=False, headers=headers
    )


async def outcome_of(client: httpx.AsyncClient, body: Mapping[str, Any], path: str = CHAT) -> str:
    """Sends one request and returns what became of it."""
    try:
        answer = await client.post(path, json=body)
    except httpx.TransportError:
        return LOST
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        assert answer.json()["error"]["message"]
        return TURNED_AWAY
    if answer.is_server_error:
        assert answer.json()["error"]["type"] == "server_error"
        return FAILED
    assert answer.status_code == 200, answer.text
    return _of_events(answer.text) if body.get("stream") else _of_choices([answer.json()])


async def outcomes_of(
    client: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]]
) -> Counter[str]:
    """Sends requests at once, and counts what became of them."""
    return Counter(await asyncio.gather(*(outcome_of(client, body) for body in bodies)))


def _of_events(text: str) -> str:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    if events[-1:] != ["[DONE]"]:
        return FAILED if '"error"' in text else LOST
    chunks = [json.loads(event) for event in events[:-1]]
    return FAILED if any("error" in chunk for chunk in chunks) else _of_choices(chunks)


def _of_choices(objects: Sequence[Mapping[str, Any]]) -> str:
    reasons = {reason for one in objects for reason in _reasons(one)} - {None}
    assert reasons <= ENDS, reasons  # vLLM's "abort" would be half an answer
    return ANSWERED


def _reasons(answer: Mapping[str, Any]) -> Iterator[str | None]:
    for choice in answer["choices"]:
        yield choice.get("finish_reason")


async def under_way(server: Server, least: int) -> None:
    """Waits until the engine works on so many answers, for a while."""
    async with asyncio.timeout(30):
        while await asyncio.to_thread(in_engine, server) < least:
            await asyncio.sleep(0.02)


def in_engine(server: Server) -> float:
    """Returns how many answers are in the engine or in its queue."""
    return server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting{")


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancels a request, which closes its connection."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
