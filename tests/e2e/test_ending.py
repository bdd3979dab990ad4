"""How a server ends: drained, killed, or without its engine. It ends the session's servers."""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress

import httpx
import psutil

from tests.e2e.calibrating import CalibratedServer
from tests.e2e.policied import ACME, Policied
from tests.e2e.servers import Server, until
from tests.e2e.traffic import (
    ANSWERED,
    FAILED,
    LOST,
    TURNED_AWAY,
    http_of,
    long_chat,
    outcomes_of,
    under_way,
)
from tests.server.wires import connect

# Far more than it takes: what is in flight fails at once, and vLLM looks at its engine every 5 s.
ENDS_WITHIN_S = 20


def check_ended(server: Server, children: list[psutil.Process], status: int) -> None:
    assert server.process.wait(timeout=30) == status
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert len(gone) == len(children)


def children_of(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert any(child.is_running() for child in children)
    return children


def test_terminated_server_loses_nothing_and_waits_for_nothing_else(policied: Policied) -> None:
    server = policied.server
    children = children_of(server)
    body = {**long_chat(300), "refusal": {"policy": "lab"}}
    flight = [{**body, "stream": i % 2 == 0, "seed": i} for i in range(48)]
    flight += [{**body, "repetition_penalty": 1.1}] * 16

    async def drain() -> tuple[Counter[str], Counter[str], list[int]]:
        async with http_of(server, authorization=f"Bearer {ACME}") as client:
            in_flight = asyncio.create_task(outcomes_of(client, flight))
            await under_way(server, 48)
            server.process.send_signal(signal.SIGTERM)
            probes = [await client.get(path) for path in ("/healthz", "/livez", "/readyz")]
            late = await outcomes_of(client, [body] * 8)
            assert not in_flight.done()
            return await in_flight, late, [probe.status_code for probe in probes]

    with connect(server.port) as half_head, connect(server.port) as half_body:
        half_head.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        half_body.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        policied.file.unlink()
        os.mkfifo(policied.file)
        until(lambda: server.metric("rheostat_policy_file_valid") == 0)
        in_flight, late, statuses = asyncio.run(drain())
        check_ended(server, children, 0)
    assert in_flight == {ANSWERED: len(flight)}
    assert late == {TURNED_AWAY: 8}
    assert statuses == [200, 200, 503]


def test_killed_server_leaves_no_process(calibrated: CalibratedServer) -> None:
    children = children_of(calibrated.server)
    calibrated.server.process.kill()
    check_ended(calibrated.server, children, -signal.SIGKILL)


def test_server_whose_engine_is_killed_says_so_and_ends(server: Server) -> None:
    children = children_of(server)
    (engine,) = (child for child in children if child.name() == "VLLM::EngineCore")
    flight = [long_chat(480, stream=i % 2 == 0, n=2) for i in range(32)]

    async def kill() -> tuple[Counter[str], float]:
        async with http_of(server) as client:
            in_flight = asyncio.create_task(outcomes_of(client, flight))
            await under_way(server, 48)
            engine.kill()
            killed_s = time.monotonic()
            outcomes = await in_flight
            return outcomes, time.monotonic() - killed_s

    outcomes, took_s = asyncio.run(kill())
    assert outcomes == {FAILED: len(flight)}
    assert LOST not in outcomes
    assert took_s < ENDS_WITHIN_S
    with suppress(httpx.TransportError):  # it may have ended already
        assert server.http.get("/livez").status_code == 503
    check_ended(server, children, 1)
